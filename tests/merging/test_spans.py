"""Merging within the span of low-rank differences: the same as with whole weights, and cut well."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cart_plugin import CartError, CartSettings, merge_tensors
from cart_plugin.merging.kept import Kept
from cart_plugin.merging.span_measures import answers, overlaps
from cart_plugin.merging.spans import Difference, Span, merge_in_span, of_rank
from tests.support import random

AUTO = CartSettings(lambda_="auto")
METHODS = {
    "auto": AUTO,
    "auto without the base": CartSettings(lambda_="auto", center="average"),
    "auto of a rank": CartSettings(lambda_="auto", rank=3),
    "auto of a ratio": CartSettings(lambda_="auto", rank_ratio=0.3),
    "auto of all": CartSettings(lambda_="auto", rank_ratio=0.9),
    "cart": CartSettings(lambda_=1.5),
    "cart of a rank": CartSettings(rank=3),
}


def differences(
    count: int, m: int, n: int, rank: int = 5, *, stack: int = 1, start: float = 0.0
) -> list[Difference]:
    """Random ones; with a start, their right factors have it in common."""
    common = random(stack, rank, n, seed=99)
    return [
        Difference(
            random(stack, m, rank, seed=seed) / 10,
            start * common + random(stack, rank, n, seed=50 + seed),
        )
        for seed in range(count)
    ]


def dense(parts: Sequence[Difference]) -> list[Tensor]:
    return [part.left @ part.right for part in parts]


def merged(
    parts: Sequence[Difference],
    settings: CartSettings | None,
    *,
    rank: int = 10_000,
    shares: Sequence[float] | None = None,
) -> Tensor:
    span = Span(parts)
    found = merge_in_span(span, shares or [1 / len(parts)] * len(parts), settings)
    left, right = span.lifted(of_rank(found, rank))
    assert left.dtype == right.dtype == parts[0].left.dtype
    return left @ right


def whole(
    parts: Sequence[Difference], settings: CartSettings, shares: Sequence[float] | None = None
) -> Tensor:
    """The same by whole weights, less the base; in fp64, which has no rounding of its own."""
    taus = dense([Difference(part.left.double(), part.right.double()) for part in parts])
    base = random(*taus[0].shape, seed=7, dtype=torch.float64)
    tensors = [base + tau for tau in taus]
    found = merge_tensors(tensors, settings, base=base, weights=shares, name="w.weight") - base
    return found.float()


@pytest.mark.cpu_only  # whole weights, as small, are iterated on elsewhere
@pytest.mark.filterwarnings("ignore:with two models")
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (24, 30)])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_merge_of_whole_weights(method: str, count: int, shape: tuple[int, int]) -> None:
    parts = differences(count, *shape)
    for shares in (None, [0.5, *[0.5 / (count - 1)] * (count - 1)]):
        expected = whole(parts, METHODS[method], shares)
        found = merged(parts, METHODS[method], shares=shares)
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.cpu_only  # whole weights, as small, are iterated on elsewhere
@pytest.mark.parametrize("count", [3, 6])
def test_stacks_of_matrices_are_merged_one_by_one(count: int) -> None:
    parts = differences(count, 24, 40, stack=3)
    expected = whole(parts, AUTO)
    assert torch.allclose(merged(parts, AUTO), expected, atol=1e-5)
    one = [Difference(part.left[1:2], part.right[1:2]) for part in parts]
    assert torch.allclose(merged(one, AUTO), expected[1:2], atol=1e-5)


@pytest.mark.parametrize("rank", [40, 90])
def test_ranks_that_add_up_to_the_full_rank_and_more(rank: int) -> None:
    parts = differences(3, 40, 60, rank)
    # Here directions are left out, and which ones depends on the solver.
    expected = whole(parts, CartSettings(lambda_="auto", svd="exact"))
    assert torch.allclose(merged(parts, AUTO), expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.cpu_only  # whole weights, as small, are iterated on elsewhere
@pytest.mark.parametrize("count", [2, 4, 6])
@pytest.mark.parametrize("least", [1e-1, 1e-2, 1e-3, 1e-6])
def test_spectra_that_decay_as_those_of_trained_adapters(least: float, count: int) -> None:
    decay = torch.logspace(0, math.log10(least), 9)
    parts = [
        Difference(part.left * decay, torch.linalg.qr(part.right.mT)[0].mT)
        for part in differences(count, 80, 120, 9)
    ]
    expected = whole(parts, AUTO)
    assert (merged(parts, AUTO) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("start", [1e3, 1e5])
def test_factors_that_are_nearly_the_same(start: float) -> None:
    """As of one start: apart by little of what they have in common, and by nearly nothing."""
    parts = differences(3, 40, 60, start=start)
    expected = whole([Difference(part.left / start, part.right) for part in parts], AUTO)
    found = merged([Difference(part.left / start, part.right) for part in parts], AUTO)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_equal_models_give_themselves() -> None:
    one = differences(1, 40, 60)
    for count in (1, 2, 3, 6):
        for settings in (AUTO, CartSettings(), None):
            found = merged(one * count, settings)
            assert torch.allclose(found, dense(one)[0], atol=1e-6)


def test_a_model_that_does_not_change_the_weight_counts() -> None:
    parts = differences(3, 40, 60)
    nothing = Difference(torch.empty(1, 40, 0), torch.empty(1, 0, 60))
    zeros = Difference(torch.zeros(1, 40, 5), torch.zeros(1, 5, 60))
    for settings in (AUTO, CartSettings(rank=3), None):
        found = merged([*parts, nothing], settings)
        assert torch.allclose(found, merged([*parts, zeros], settings), atol=1e-6)
    assert torch.allclose(found, sum(dense(parts)) / 4, atol=1e-6)
    assert torch.equal(merged([zeros, nothing], AUTO), torch.zeros(1, 40, 60))


def test_scales_do_not_matter() -> None:
    parts = differences(3, 40, 60)
    found = merged(parts, AUTO)
    for scale in (2.0**-60, 2.0**60):
        scaled = [Difference(left * scale, right) for left, right in parts]
        assert torch.allclose(merged(scaled, AUTO) / scale, found, atol=1e-6)


def objective(metric: Tensor, exact: Tensor, found: Tensor) -> float:
    change = (found - exact).double()
    return float(torch.trace((change @ metric.double() @ change.mT)[0]))


@pytest.mark.parametrize("count", [3, 6])
@pytest.mark.parametrize("rank", [2, 5, 9])
def test_a_rank_is_the_best_of_its_objective(count: int, rank: int) -> None:
    span = Span(differences(count, 40, 60, start=0.5))
    found = merge_in_span(span, [1 / count] * count, AUTO)
    cut = of_rank(found, rank)
    assert cut.rank == rank
    plain = of_rank(found._replace(metric=None), rank)
    best = objective(found.metric, found.total, cut.dense())
    assert best < 0.98 * objective(found.metric, found.total, plain.dense())
    # The least of all matrices of this rank: what is left of the singular values of N G^(1/2).
    values, vectors = torch.linalg.eigh(found.metric)
    root = vectors @ (values.clamp_min(0).sqrt()[..., None] * vectors.mT)
    left = torch.linalg.svdvals(found.total @ root)[0, rank:].square().sum()
    assert math.isclose(best, float(left), rel_tol=1e-6)


def test_the_metric_is_that_of_the_system() -> None:
    """A small change of the minimum raises the sum of squares by what the metric says."""
    parts = differences(3, 40, 60, rank=12)  # of 9 directions
    span = Span(parts)
    found = merge_in_span(span, [0.5, 0.3, 0.2], AUTO)
    expected = torch.zeros_like(found.metric)
    for part, share in zip(span.parts, [0.5, 0.3, 0.2], strict=True):
        values, rows = part.S[..., :9], part.Vh[..., :9, :]
        covariance = rows.mT @ (values.square()[..., None] * rows)
        expected += 3 * share * covariance / values.square().sum()
    expected += 0.3 * 3 / 27 * torch.eye(36)
    assert torch.allclose(found.metric, expected, atol=1e-9)


def test_what_is_kept_is_counted_as_of_whole_weights() -> None:
    parts = differences(3, 40, 60)
    for settings, is_whole in ((CartSettings(rank=15), True), (CartSettings(rank=2), False)):
        kept = Kept()
        merge_in_span(Span(parts), [1 / 3] * 3, settings, name="w", kept=kept)
        assert (kept.warning() is not None) == is_whole


def test_negative_weights_are_refused_where_they_mean_nothing() -> None:
    span = Span(differences(3, 40, 60))
    with pytest.raises(CartError, match="auto takes no negative weights"):
        merge_in_span(span, [0.8, 0.4, -0.2], AUTO)
    assert merge_in_span(span, [0.8, 0.4, -0.2], CartSettings(rank=2)).total.isfinite().all()


def test_answers_are_measured_on_each_models_own_inputs() -> None:
    parts = differences(2, 40, 60)
    span = Span(parts)
    first = span.parts[0].dense()
    own = dense(parts)[0].double()[0]
    inputs = own.mT @ own / own.square().sum()
    found = answers(span.parts, first / 2)
    assert math.isclose(found.own[0], float(torch.trace(own @ inputs @ own.mT)), rel_tol=1e-6)
    assert math.isclose(found.along[0], found.own[0] / 2, rel_tol=1e-9)
    assert math.isclose(found.beside[0], found.own[0] / 4, rel_tol=1e-9)


def test_overlaps_are_those_of_the_factors() -> None:
    one, other = differences(2, 40, 60)
    same_inputs = Difference(other.left, one.right)
    found = overlaps(Span([one, same_inputs, other]).parts)
    taus = dense([one, same_inputs, other])
    for i in range(3):
        for j in range(3):
            inner = (taus[i] * taus[j]).sum().double()
            assert torch.allclose(found.inner[i, j], inner, rtol=1e-4, atol=1e-4)
    assert math.isclose(found.inputs[0, 1], 1, abs_tol=1e-6)
    assert math.isclose(found.outputs[1, 2], 1, abs_tol=1e-6)
    assert found.inputs[0, 2] < 0.3
    assert found.outputs[0, 1] < 0.3


@pytest.mark.parametrize("ranks", [(3, 2), (12, 20)])
def test_what_differences_answer_to_inputs_is_told_in_coordinates(ranks: tuple[int, int]) -> None:
    pairs = [
        Difference(random(1, 10, rank, seed=rank), random(1, rank, 14, seed=rank + 50))
        for rank in ranks
    ]
    inputs = random(14, 6, seed=3)
    span = Span(pairs)
    for part, pair in zip(span.parts, pairs, strict=True):
        found = (part.dense() @ span.inputs(inputs)).norm()
        assert float(found) == pytest.approx(
            float((pair.left @ pair.right @ inputs).norm()), rel=1e-5
        )


def test_the_first_models_of_a_span_merge_as_if_they_were_alone() -> None:
    pairs = [
        Difference(random(1, 10, 2, seed=seed), random(1, 2, 14, seed=seed + 50))
        for seed in range(4)
    ]
    shares, settings = [1 / 3] * 3, CartSettings(lambda_="auto")
    alone, every = Span(pairs[:3]), Span(pairs)
    found = merge_in_span(every.first(3), shares, settings).total
    expected = merge_in_span(alone, shares, settings).total
    assert len(every.parts) == 4
    assert float(found.norm()) == pytest.approx(float(expected.norm()), rel=1e-5)
