"""The term of least interference: against its normal equations, and what must hold of any merge."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cart_plugin import CartError, CartSettings, merge_tensors
from cart_plugin.errors import CartWarning
from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import truncated_svd
from cart_plugin.merging.least_interference import least_interference
from cart_plugin.merging.normal_equations import System

AUTO = CartSettings(lambda_="auto")


def matrices(count: int, m: int, n: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m, n, generator=generator) for _ in range(count)]


def factored(deltas: Sequence[Tensor], rank: int) -> list[tuple[LowRank, float]]:
    return [(truncated_svd(delta, RankRule(rank=rank)), 1.0) for delta in deltas]


def by_definition(parts: Sequence[tuple[LowRank, float]], ridge: float, pull: float) -> Tensor:
    """The normal equations in fp64, written down as they stand."""
    dense = [(factors.dense().double(), weight) for factors, weight in parts]
    covariances = [(d.mT @ d / torch.linalg.matrix_norm(d, 2) ** 2, w) for d, w in dense]
    n = dense[0][0].shape[-1]
    mean = sum(w * c.trace() for c, w in covariances) / n
    plain = sum(w * d for d, w in dense)
    kept = plain.square().sum() / sum(w * d.square().sum() for d, w in dense)
    right = sum(w * d @ c for (d, w), (c, _) in zip(dense, covariances, strict=True))
    right = right + pull * mean * plain / max(kept, 0.1)
    system = sum(w * c for c, w in covariances) + ridge * mean * torch.eye(n, dtype=torch.float64)
    return torch.linalg.solve(system, right, left=False)


# The ranks sum to less than n (a system of that size), to more (n unknowns), on either orientation.
@pytest.mark.parametrize(("m", "n", "rank"), [(24, 64, 5), (64, 24, 5), (24, 24, 24), (8, 96, 8)])
@pytest.mark.parametrize(("ridge", "pull"), [(0.01, 0.0), (0.1, 0.3), (1.0, 1.0)])
def test_it_solves_the_normal_equations(
    m: int, n: int, rank: int, ridge: float, pull: float
) -> None:
    parts = [
        (factors, weight)
        for (factors, _), weight in zip(
            factored(matrices(4, m, n), rank), (1.0, 0.5, 2.0, 0.5), strict=True
        )
    ]
    expected = by_definition(parts, ridge, pull)
    found = least_interference(iter(parts), ridge, pull)
    assert torch.linalg.norm(found - expected) < 1e-4 * torch.linalg.norm(expected)


def test_nothing_else_interferes_less() -> None:
    parts = factored(matrices(3, 12, 20), 4)
    dense = [factors.dense().double() for factors, _ in parts]
    plain = sum(dense)
    strong = plain * sum(d.square().sum() for d in dense) / plain.square().sum()

    def objective(merged: Tensor) -> float:
        mean = sum((d.norm() / torch.linalg.matrix_norm(d, 2)) ** 2 for d in dense) / 20
        total = 0.1 * mean * merged.square().sum() - 2 * 0.3 * mean * (merged * strong).sum()
        for factors, weight in parts:
            d = factors.dense().double()
            c = d.mT @ d / torch.linalg.matrix_norm(d, 2) ** 2
            total += weight * ((merged - d) @ c @ (merged - d).mT).trace()
        return float(total)

    best = least_interference(parts, 0.1, 0.3).double()
    for step in matrices(10, 12, 20, seed=1):
        for size in (1e-3, 1e-2, 0.1):
            assert objective(best) < objective(best + size * step.double())


def test_stacks_are_solved_matrix_by_matrix() -> None:
    stacks = [torch.stack(matrices(3, 10, 16, seed)) for seed in range(4)]
    parts = factored(stacks, 3)
    found = least_interference(parts)
    for index in range(3):
        one = factored([stack[index] for stack in stacks], 3)
        assert torch.allclose(found[index], least_interference(one), atol=1e-5)


@pytest.mark.parametrize("rank", [6, 3])
@pytest.mark.parametrize("ridge", [None, 1e-3, 10.0])
def test_tasks_on_orthogonal_inputs_are_reproduced_exactly(rank: int, ridge: float | None) -> None:
    inputs = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(2)))[0]
    deltas = [
        (3.0**-task) * left @ inputs[6 * task : 6 * task + 6]
        for task, left in enumerate(matrices(4, 16, 6))
    ]
    parts = factored(deltas, rank)
    merged = least_interference(parts, *([] if ridge is None else [ridge, ridge]))
    for factors, _ in parts:
        own, delta = factors.Vh.mT, factors.dense()
        assert torch.linalg.norm((merged - delta) @ own) < 1e-4 * torch.linalg.norm(delta)
    assert torch.allclose(merged, sum(factors.dense() for factors, _ in parts), atol=1e-4)


def nearly_cancelling(kept: float) -> list[tuple[LowRank, float]]:
    """Four tasks whose sum keeps this share of them."""
    a, b = matrices(2, 20, 30)
    # Their sum is e (a + b), and e^2 = kept (1 + (1 - e)^2).
    e = ((kept**2 + 2 * kept * (1 - kept)) ** 0.5 - kept) / (1 - kept)
    return factored([a, b, -(1 - e) * a, -(1 - e) * b], 20)


@pytest.mark.parametrize("kept", [0.02, 0.06, 0.15])
def test_a_sum_is_scaled_up_tenfold_at_most(kept: float) -> None:
    parts = nearly_cancelling(kept)
    deltas = [factors.dense() for factors, _ in parts]
    found = sum(deltas).square().sum() / sum(delta.square().sum() for delta in deltas)
    assert abs(found - kept) < 1e-3  # as the test wants it
    expected = by_definition(parts, 1.0, 1.0)
    merged = least_interference(parts)
    assert torch.linalg.norm(merged - expected) < 1e-4 * torch.linalg.norm(expected)


def test_a_sum_that_cancels_is_not_blown_up() -> None:
    deltas = matrices(3, 12, 20)
    deltas.append(-sum(deltas))
    # At full rank the sum is rounding, and the pull towards it nothing.
    full = factored(deltas, 12)
    assert torch.allclose(least_interference(full), least_interference(full, pull=0.0), atol=1e-4)
    opposite = factored([deltas[0], -deltas[0]], 4)
    assert least_interference(opposite).abs().max() < 1e-4


def test_a_ridge_much_larger_than_the_pull_gives_the_centre() -> None:
    parts = factored(matrices(3, 12, 20), 4)
    assert least_interference(parts, 1e9).abs().max() < 1e-6


def test_without_inputs_to_go_by_it_is_the_sum_at_full_strength() -> None:
    parts = factored(matrices(3, 12, 20), 4)
    sum_ = least_interference(parts, 1e6, pull=1e6).double()
    dense = [factors.dense().double() for factors, _ in parts]
    own = sum((sum_ * d).sum() for d in dense)
    assert abs(own / sum(d.square().sum() for d in dense) - 1) < 1e-4
    assert torch.allclose(sum_ / sum_.norm(), sum(dense) / sum(dense).norm(), atol=1e-4)


def test_a_task_that_changed_nothing_adds_nothing_but_its_share_of_the_centre() -> None:
    tensors = matrices(3, 16, 24)
    others = factored(tensors, 4)
    zero = truncated_svd(torch.zeros(16, 24), RankRule(rank=4))
    found = least_interference([*others, (zero, 1.0)])
    assert torch.allclose(found, least_interference(others), atol=1e-4)


def test_equal_models_give_themselves() -> None:
    (one,) = matrices(1, 16, 24)
    assert torch.allclose(merge_tensors([one] * 4, AUTO, name="w"), one, atol=1e-6)


def test_the_order_of_the_models_does_not_matter_and_scales_pass_through() -> None:
    tensors = matrices(4, 16, 24)
    merged = merge_tensors(tensors, AUTO, name="w")
    assert torch.allclose(merge_tensors(tensors[::-1], AUTO, name="w"), merged, atol=1e-5)
    for scale in (2.0**-100, 2.0**-60, 2.0**40, 2.0**100):
        scaled = merge_tensors([scale * tensor for tensor in tensors], AUTO, name="w")
        assert torch.allclose(scaled / scale, merged, atol=1e-5)


def test_a_weight_counts_as_so_many_models() -> None:
    a, b, c = matrices(3, 16, 24)
    twice = merge_tensors([a, a, b, c], AUTO, name="w")
    weighted = merge_tensors([a, b, c], AUTO, weights=[2.0, 1.0, 1.0], name="w")
    assert torch.allclose(weighted, twice, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.16, 0.5, 0.9])
def test_a_model_of_weight_0_is_as_good_as_absent(ratio: float) -> None:
    settings = CartSettings(lambda_="auto", rank_ratio=ratio)
    a, b, c, *others = matrices(9, 16, 24)
    merged = merge_tensors([a, b, c], settings, name="w")
    weights = [0.7, 0.7, 0.7, *(0.0 for _ in others)]
    same = merge_tensors([a, b, c, *others], settings, weights=weights, name="w")
    assert torch.allclose(same, merged, atol=1e-5)


@pytest.mark.cpu_only  # small matrices of a stack are iterated on together elsewhere
@pytest.mark.parametrize("rule", [{"rank_ratio": 0.16}, {"energy": 0.8}, {"rank": 30}])
@pytest.mark.parametrize("count", [3, 20])
def test_any_rule_number_of_models_and_scale_gives_finite_weights(
    rule: dict[str, float], count: int
) -> None:
    settings = CartSettings(lambda_="auto", **rule)  # type: ignore[arg-type]
    stack = torch.stack(matrices(3, 40, 32))
    # Experts of very different size, and one that no model changed.
    sizes = torch.tensor([1.0, 1e-13, 0.0])[:, None, None]
    changes = [
        sizes * torch.randn(3, 40, 32, generator=torch.Generator().manual_seed(seed))
        for seed in range(count)
    ]
    merged = merge_tensors([stack + change for change in changes], settings, name="experts")
    assert torch.isfinite(merged).all()
    assert torch.allclose(merged[2], stack[2], atol=1e-6)
    alone = merge_tensors([(stack + change)[0] for change in changes], settings, name="experts")
    assert torch.allclose(merged[0], alone, atol=1e-4)
    small = merge_tensors(changes, settings, name="experts")
    assert torch.isfinite(small).all()
    one = merge_tensors([change[1] for change in changes], settings, name="experts")
    assert torch.linalg.norm(small[1] - one) < 1e-3 * torch.linalg.norm(one)


def test_around_the_base_it_adds_the_task_vectors_of_least_interference() -> None:
    base, *changes = matrices(3, 16, 24)
    strided = base.mT.contiguous().mT
    settings = CartSettings(lambda_="auto", center="base")
    merged = merge_tensors([base + change for change in changes], settings, base=strided, name="w")
    parts = [(truncated_svd(change, RankRule(0.16)), 1.0) for change in changes]
    assert torch.allclose(merged, base + least_interference(parts), atol=1e-4)
    assert merged.is_contiguous()


def test_two_models_are_averaged_with_a_warning() -> None:
    one, other = matrices(2, 16, 24)
    with pytest.warns(CartWarning, match="with two models CART is plain averaging"):
        merged = merge_tensors([one, other], AUTO, name="w")
    assert torch.allclose(merged, (one + other) / 2, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_worked_in_fp32(dtype: torch.dtype) -> None:
    tensors = [tensor.to(dtype) for tensor in matrices(4, 16, 24)]
    exact = merge_tensors([tensor.float() for tensor in tensors], AUTO, name="w")
    found = merge_tensors(tensors, AUTO, name="w")
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype))


def test_full_rank_is_not_the_average() -> None:
    tensors = matrices(4, 16, 24)
    full = merge_tensors(tensors, CartSettings(lambda_="auto", rank_ratio=1.0), name="w")
    assert (full - sum(tensors) / 4).abs().max() > 0.1


def test_without_a_rule_a_sixth_is_kept() -> None:
    assert AUTO.rule.rank_ratio == 0.16
    assert CartSettings(lambda_="auto", rank=3).rule.rank == 3
    assert CartSettings().rule.rank_ratio == 0.08


def test_negative_weights_and_other_words_are_refused() -> None:
    with pytest.raises(CartError, match=r"cart_auto .* takes no negative weights"):
        merge_tensors(matrices(3, 8, 8), AUTO, weights=[2.0, 1.0, -0.5], name="w")
    with pytest.raises(CartError, match="lambda must be a finite number or 'auto', got 'best'"):
        CartSettings(lambda_="best")  # type: ignore[arg-type]


@pytest.mark.parametrize(("noise", "strength"), [(0.0, 1.25), (6.0, 1.25), (7.5, 0.625), (9.0, 0)])
def test_a_sum_that_is_nearly_all_rounding_is_not_scaled_up(noise: float, strength: float) -> None:
    """The sum keeps 8 of 10 squares: less than a tenth of these is real from 7 of rounding on."""
    size = torch.tensor([4.0**0.5, 1.0])
    parts = [
        LowRank(torch.eye(2), size, torch.eye(2)),
        LowRank(torch.eye(2), size, torch.diag(torch.tensor([0.0, 1.0]))),
    ]
    system = System()
    for part in parts:
        system.add(part, 1.0, rounding=torch.tensor(noise / 2, dtype=torch.float64))
    total = sum(part.dense() for part in parts)
    assert float(total.square().sum()) == 8
    assert float(system.energy) == 10
    assert float(system.strength(1.0)) * 2 / float(system.trace) == pytest.approx(strength)
