"""What the equation implies, on matrices and settings drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cart_plugin.errors import CartWarning
from cart_plugin.merging.cart import merge_tensors
from cart_plugin.merging.settings import CartSettings
from tests.merging.helpers import EXACT
from tests.support import cart_formula, random, relative_error


class Draw:
    """A few models' matrices and settings to merge them with."""

    def __init__(self, shape: tuple[int, int], count: int, seed: int, weighted: bool) -> None:
        self.tensors = [random(*shape, seed=seed + i) for i in range(count)]
        drawn = random(count, seed=seed + 50).abs() + 0.1
        self.weights = drawn.tolist() if weighted else [1.0] * count
        self.rank = 1 + seed % min(shape)
        self.settings = CartSettings(rank=self.rank, lambda_=0.5 + seed % 3, svd=EXACT)

    @property
    def mean(self) -> Tensor:
        """The weighted average."""
        return cart_formula(self.tensors, 0, weights=self.weights)

    def merge(
        self, tensors: Sequence[Tensor] | None = None, settings: CartSettings | None = None
    ) -> Tensor:
        """Merge these tensors, or others in their place."""
        return merge_tensors(
            self.tensors if tensors is None else tensors,
            settings or self.settings,
            weights=self.weights,
        )


draws = st.builds(
    Draw,
    shape=st.tuples(st.integers(2, 20), st.integers(2, 20)),
    count=st.integers(3, 6),
    seed=st.integers(0, 10_000),
    weighted=st.booleans(),
)
algebra = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> bool:
    return relative_error(found, expected) <= tolerance


@algebra
@given(draws, st.sampled_from([{"rank_ratio": 1.0}, {"rank": 100}, {"energy": 1.0}]))
def test_full_rank_gives_the_weighted_average(draw: Draw, rule: dict[str, Any]) -> None:
    assert close(draw.merge(settings=CartSettings(**rule, lambda_=2.5)), draw.mean)


@algebra
@given(draws, st.sampled_from([{"rank_ratio": 0.0}, {"rank": 0}, {"energy": 0.0}]))
def test_rank_zero_gives_the_weighted_average(draw: Draw, rule: dict[str, Any]) -> None:
    assert close(draw.merge(settings=CartSettings(**rule)), draw.mean)


@algebra
@given(draws)
def test_lambda_zero_gives_the_weighted_average(draw: Draw) -> None:
    assert close(draw.merge(settings=CartSettings(rank=draw.rank, lambda_=0.0)), draw.mean)


@algebra
@given(draws, st.randoms(use_true_random=False))
def test_order_of_models_does_not_matter(draw: Draw, shuffler: Any) -> None:
    order = list(range(len(draw.tensors)))
    shuffler.shuffle(order)
    merged = merge_tensors(
        [draw.tensors[i] for i in order],
        draw.settings,
        weights=[draw.weights[i] for i in order],
    )
    assert close(merged, draw.merge())


@algebra
@given(draws, st.integers(0, 100))
def test_adding_a_tensor_to_all_inputs_adds_it_to_the_output(draw: Draw, seed: int) -> None:
    offset = random(*draw.tensors[0].shape, seed=seed + 77)
    merged = draw.merge([tensor + offset for tensor in draw.tensors])
    assert close(merged, draw.merge() + offset, 1e-4)


@algebra
@given(draws, st.sampled_from([-2.0, 1e-6, 0.37, 1e6]))
def test_scaling_inputs_scales_the_output(draw: Draw, scale: float) -> None:
    merged = draw.merge([scale * tensor for tensor in draw.tensors])
    assert close(merged, scale * draw.merge())


@algebra
@given(draws, st.sampled_from([0.01, 3.0, 1e4]))
def test_only_the_ratio_of_weights_matters(draw: Draw, scale: float) -> None:
    scaled = [scale * weight for weight in draw.weights]
    assert close(merge_tensors(draw.tensors, draw.settings, weights=scaled), draw.merge())


@algebra
@given(draws)
def test_equal_models_give_themselves(draw: Draw) -> None:
    merged = draw.merge([draw.tensors[0]] * len(draw.tensors))
    assert close(merged, draw.tensors[0], 1e-6)


@algebra
@given(draws, st.integers(0, 100))
def test_permuting_rows_or_columns_commutes(draw: Draw, seed: int) -> None:
    m, n = draw.tensors[0].shape
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(m, generator=generator), torch.randperm(n, generator=generator)
    merged = draw.merge([tensor[rows][:, columns] for tensor in draw.tensors])
    assert close(merged, draw.merge()[rows][:, columns], 1e-4)


@algebra
@given(draws)
def test_transposing_commutes(draw: Draw) -> None:
    assert close(draw.merge([tensor.mT for tensor in draw.tensors]), draw.merge().mT, 1e-4)


@algebra
@given(draws)
def test_two_models_give_their_average_whatever_the_rank(draw: Draw) -> None:
    pair, weights = draw.tensors[:2], draw.weights[:2]
    with pytest.warns(CartWarning, match=r"with two models.* CART is plain averaging"):
        merged = merge_tensors(pair, CartSettings(rank=1, lambda_=3.0), weights=weights)
    assert close(merged, cart_formula(pair, 0, weights=weights))


def test_energy_zero_averages() -> None:
    tensors = [random(6, 8, seed=seed) for seed in range(3)]
    merged = merge_tensors(tensors, CartSettings(energy=0.0, lambda_=9.0))
    assert torch.allclose(merged, torch.stack(tensors).mean(0), atol=1e-6)
