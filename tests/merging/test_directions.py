"""A merge as a sum over singular directions is that merge, and its candidates are singular."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cart_plugin import CartError, CartSettings, merge_tensors
from cart_plugin.merging.directions import Directions, directions_of
from tests.merging.helpers import versions, with_spectra
from tests.support import power_law, random

WEIGHTS = [1.0, 3.0, 0.5, 2.0]


def merged(found: Directions, weights: Sequence[float], scale: float) -> Tensor:
    """The sum over the directions that are kept."""
    total = found.centre.double()
    for factors, kept, weight in zip(found.factors, found.kept, weights, strict=True):
        left = factors.U.double() * (factors.S.double() * kept)[..., None, :]
        weight *= len(weights) / sum(weights)
        total = total + scale * weight * (left @ factors.Vh.double()).view(total.shape)
    return total


@pytest.mark.parametrize("candidates", [None, 0.5, 1.0])
@pytest.mark.parametrize(
    "settings",
    [
        {"rank_ratio": 0.2, "lambda_": 1.7},
        {"energy": 0.5},
        {"rank": 3, "lambda_": 0.4, "center": "base"},
        {"rank": 0},
        {"lambda_": "auto"},
        {"lambda_": "auto", "rank_ratio": 0.4, "svd": "exact"},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(24, 32), (32, 24), (2, 12, 16)], ids=str)
def test_the_kept_directions_are_the_merge(
    settings: dict[str, Any], candidates: float | None, shape: tuple[int, ...]
) -> None:
    chosen, tensors = CartSettings(**settings), versions(*shape)
    base = random(*shape, seed=9) if chosen.center == "base" else None
    if "energy" in settings and candidates == 0.5:
        candidates = 0.9  # of half the energy more than half of the directions may be
    expected = merge_tensors(tensors, chosen, weights=WEIGHTS, base=base, name="x")
    found = directions_of(
        tensors, chosen, weights=WEIGHTS, base=base, name="x", candidates=candidates
    )
    scale = 1.0 if chosen.lambda_ == "auto" else float(chosen.lambda_)
    assert torch.allclose(merged(found, WEIGHTS, scale).float(), expected, atol=1e-5)
    if candidates is not None:
        assert {factors.rank for factors in found.factors} == {int(candidates * min(shape[-2:]))}


def test_few_directions_that_differ_are_kept_as_cart_keeps_them() -> None:
    tensors = with_spectra(power_law(32, 1) * (torch.arange(32) < 4), 32, 40)
    expected = merge_tensors(tensors, name="x")
    found = directions_of(tensors, name="x", candidates=1.0)
    assert torch.allclose(merged(found, [1.0] * 4, 1.0).float(), expected, atol=1e-6)


def test_candidates_are_the_singular_directions_of_each_difference() -> None:
    tensors = versions(16, 24)
    found = directions_of(tensors, CartSettings(rank=4), candidates=1.0)
    for tensor, factors in zip(tensors, found.factors, strict=True):
        delta = tensor - torch.stack(tensors).mean(0)
        assert torch.allclose(factors.S[0], torch.linalg.svdvals(delta), atol=1e-4)
        assert torch.allclose(factors.dense()[0], delta, atol=1e-4)


def test_a_model_without_weight_has_directions_but_no_part() -> None:
    tensors, weights = versions(16, 24), [1.0, 0.0, 2.0, 1.0]
    for settings in (CartSettings(rank=4), CartSettings(lambda_="auto")):
        found = directions_of(tensors, settings, weights=weights, candidates=0.5)
        expected = merge_tensors(tensors, settings, weights=weights)
        assert torch.allclose(merged(found, weights, 1.0).float(), expected, atol=1e-5)
        assert found.factors[1].S.min() > 0


def test_fewer_candidates_than_are_kept_are_refused() -> None:
    with pytest.raises(CartError, match=r"keeps 8 singular directions, but candidates=0.25 are 4"):
        directions_of(versions(16, 24), CartSettings(rank=8), candidates=0.25)


@pytest.mark.parametrize("weights", [[1.0] * 6, [2.0, 1.0, 0.0, 1.0, 0.5, 1.0]], ids=str)
@pytest.mark.parametrize("candidates", [None, 1.0])
@pytest.mark.parametrize("shape", [(40, 60), (2, 40, 60)], ids=str)
def test_the_directions_of_many_that_lora_has_made(
    weights: list[float], candidates: float | None, shape: tuple[int, ...]
) -> None:
    """Of so many `cart_auto` has another form, which keeps all of each."""
    stack = shape[:-2]
    base, auto = random(*shape, seed=9), CartSettings(lambda_="auto")
    tensors = [
        base + random(*stack, 40, 3, seed=2 * task) @ random(*stack, 3, 60, seed=2 * task + 1)
        for task in range(len(weights))
    ]
    name = "mlp.experts.up_proj" if stack else "x"
    expected = merge_tensors(tensors, auto, weights=weights, name=name)
    found = directions_of(tensors, auto, weights=weights, name=name, candidates=candidates)
    assert torch.allclose(merged(found, weights, 1.0).float(), expected, atol=1e-4)
    for factors, weight in zip(found.factors, weights, strict=True):
        assert factors.rank > 3 or not weight  # of the difference from the average, all of it
    with pytest.raises(CartError, match="singular directions, but candidates=0"):
        directions_of(tensors, auto, weights=weights, name=name, candidates=0.1)


@pytest.mark.parametrize("kind", ["whole", "LoRA", "one is the base"])
@pytest.mark.parametrize(
    "weights",
    [[1.0] * 2, [1.0] * 3, [1.0] * 4, [2.0, 1.0], [2.0, 1.0, 0.0, 0.5]],
    ids=str,
)
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (2, 40, 60)], ids=str)
def test_the_directions_where_the_base_shows_the_inputs(
    kind: str, weights: list[float], shape: tuple[int, ...]
) -> None:
    """Also of four models, whose merge is the mean of two forms."""
    *stack, m, n = shape
    base, auto = random(*shape, seed=9), CartSettings(lambda_="auto")
    tensors = [base + 0.1 * random(*shape, seed=task) for task in range(len(weights))]
    if kind == "LoRA":
        tensors = [
            base + random(*stack, m, 3, seed=2 * task) @ random(*stack, 3, n, seed=2 * task + 1)
            for task in range(len(weights))
        ]
    elif kind == "one is the base":
        tensors[0] = base.clone()
    name = "mlp.experts.up_proj" if stack else "x"
    expected = merge_tensors(tensors, auto, weights=weights, base=base, name=name)
    found = directions_of(tensors, auto, weights=weights, base=base, name=name, candidates=0.5)
    assert torch.allclose(merged(found, weights, 1.0).float(), expected, atol=1e-5)
    assert not torch.allclose(expected, merge_tensors(tensors, auto, weights=weights), atol=1e-2)
    with pytest.raises(CartError, match="singular directions, but candidates=0"):
        directions_of(tensors, auto, weights=weights, base=base, name=name, candidates=0.03)


@pytest.mark.parametrize("weights", [[1.0] * 4, [1.0, 0.0, 2.0, 1.0]], ids=str)
def test_directions_that_are_rounding_are_left_out(weights: list[float]) -> None:
    """Adapters that were merged into bf16 weights, without a base."""
    base, auto = 2 * random(60, 80, seed=9), CartSettings(lambda_="auto")
    tensors = [
        (base + 0.1 * random(60, 2, seed=2 * task) @ random(2, 80, seed=2 * task + 1)).bfloat16()
        for task in range(4)
    ]
    found = directions_of([one.float() for one in tensors], auto, weights=weights, name="x")
    expected = merge_tensors([one.float() for one in tensors], auto, weights=weights, name="x")
    assert torch.allclose(merged(found, weights, 1.0).float(), expected, atol=1e-4)
    assert all(one.rank <= 8 for one, share in zip(found.factors, weights, strict=True) if share)
