"""What rounding adds to differences of weights."""

from __future__ import annotations

import pytest
import torch

from cart_plugin.linalg.gram import total_energy
from cart_plugin.linalg.rounding import (
    centred_rounding,
    edge_within,
    is_drowned,
    rounding_beyond,
    rounding_edge,
    rounding_energy,
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


def test_where_rounding_is_most_of_a_difference_it_is_no_more_than_that() -> None:
    total = torch.tensor([8.0, 8.0])
    found = edge_within(total, torch.tensor([1.0, 100.0]), 20, 10)
    assert torch.equal(found, rounding_edge(torch.tensor([1.0, 4.0]), 20, 10))


def test_a_difference_from_the_weighted_mean_has_the_rounding_of_all() -> None:
    shares = [0.5, 0.3, 0.2]
    weights = [0.1 * random(80, 60, seed=seed)[None] for seed in range(3)]
    stored = [weight.bfloat16().float() for weight in weights]
    errors = [left - right for left, right in zip(stored, weights, strict=True)]
    mean = sum(share * error for share, error in zip(shares, errors, strict=True))
    found = centred_rounding([rounding_energy(weight) for weight in stored], shares)
    for own, error in zip(found, errors, strict=True):
        assert float(own / total_energy(error - mean)) == pytest.approx(1, abs=0.1)


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


def test_what_rounding_leaves_beside_leading_directions() -> None:
    """At most what is expected, and not much less."""
    _, error = rounded(torch.bfloat16)
    total = total_energy(error)
    for k in (5, 15, 20):
        values = torch.linalg.svdvals(error)[:, k:].double()
        share = values.square().sum(dim=1) / rounding_beyond(total, k, 80, 60)
        assert ((share > 0.6) & (share < 1)).all()
    assert (rounding_beyond(total, 60, 80, 60) == 0).all()


def test_changes_that_are_mostly_rounding_are_told() -> None:
    total = torch.tensor([10.0, 10.0, 0.0], dtype=torch.float64)
    rounding = torch.tensor([2.0, 6.0, 1.0], dtype=torch.float64)
    assert is_drowned(total, rounding).tolist() == [False, True, True]
