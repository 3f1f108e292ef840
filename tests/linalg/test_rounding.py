"""What rounding adds to differences of weights."""

from __future__ import annotations

import pytest
import torch

from cart_plugin.linalg.gram import total_energy
from cart_plugin.linalg.rounding import (
    rounding_edge,
    rounding_energy,
    rounding_in,
    stored_dtype,
)
from tests.support import random

NARROW = [torch.bfloat16, torch.float16]


def rounded(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A stack of two weights, and their rounding errors."""
    exact = 0.1 * torch.stack([random(80, 60, seed=1), 3 * random(80, 60, seed=2)])
    stored = exact.to(dtype)
    return stored, stored.float() - exact


@pytest.mark.parametrize("dtype", NARROW)
def test_the_energy_of_rounding_errors_is_known(dtype: torch.dtype) -> None:
    stored, error = rounded(dtype)
    actual = total_energy(error)
    assert ((rounding_energy(stored) / actual - 1).abs() < 0.1).all()
    assert torch.equal(rounding_energy(stored.float()), rounding_energy(stored))


@pytest.mark.parametrize("dtype", NARROW)
def test_singular_values_of_rounding_errors_lie_below_the_edge(dtype: torch.dtype) -> None:
    stored, error = rounded(dtype)
    largest = torch.linalg.svdvals(error)[:, 0]
    share = largest / rounding_edge(rounding_energy(stored), 80, 60)
    assert ((share > 0.9) & (share < 1.1)).all()


def test_what_was_stored_in_fewer_bits_is_told_by_its_values() -> None:
    exact = random(80, 60)
    assert stored_dtype(exact) == torch.float32
    for dtype in NARROW:
        assert stored_dtype(exact.to(dtype)) == dtype
        assert stored_dtype(exact.to(dtype).float()) == dtype
        mixed = exact.clone()
        mixed[0] = mixed[0].to(dtype)  # a first line that says nothing of the others
        assert stored_dtype(mixed) == torch.float32
    assert rounding_energy(exact[None]) < 1e-12 * total_energy(exact[None])


def test_an_estimate_that_cannot_hold_is_limited() -> None:
    total = torch.tensor([10.0, 10.0, 0.0], dtype=torch.float64)
    rounding = torch.tensor([2.0, 6.0, 1.0], dtype=torch.float64)
    assert rounding_in(total, rounding).tolist() == [2, 2.5, 0]
