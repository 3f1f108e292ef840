"""The theory's quantities against dense computations, and the bound against what it bounds."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import truncated_svd
from cart_plugin.merging.interference import (
    Fit,
    cancellation,
    effective_rank,
    fit_inputs,
    interference,
    interference_bound,
    pair_interferences,
    reconstruction_errors,
    stand_in_inputs,
    task_interferences,
)
from cart_plugin.merging.span_measures import answers
from tests.support import power_law, random, with_spectrum

RANKS = [1, 2, 5, 9, 12]


def differences(count: int = 3, m: int = 12, n: int = 20) -> list[Tensor]:
    return [
        with_spectrum(power_law(min(m, n), 0.7), m, n, seed=7 * seed, dtype=torch.float64)
        for seed in range(count)
    ]


def leading(matrix: Tensor, rank: int) -> LowRank:
    return truncated_svd(matrix, RankRule(rank=rank), svd="exact")


def energies(matrices: list[Tensor]) -> Tensor:
    return torch.stack([matrix.square().sum() for matrix in matrices])


def best(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def rows(matrix: Tensor, rank: int) -> Tensor:
    """``N V^T`` of the paper."""
    _, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (s[:rank] / s[:rank].norm())[:, None] * vh[:rank]


def test_what_truncation_leaves_out_is_that_of_dense_matrices() -> None:
    matrices = differences()
    parts = [leading(matrix[None], 12) for matrix in matrices]
    found = reconstruction_errors(parts, energies(matrices)[:, None], RANKS)
    expected = [
        sum(float((matrix - best(matrix, k)).square().sum()) for matrix in matrices) for k in RANKS
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_interference_of_row_spaces_is_that_of_dense_matrices() -> None:
    matrices = differences()
    parts = [leading(matrix[None], 12) for matrix in matrices]
    expected = [
        sum(
            float((rows(one, k) @ rows(other, k).mT).norm())
            for one, other in itertools.permutations(matrices, 2)
        )
        for k in RANKS
    ]
    found = interference(pair_interferences(parts, RANKS))
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_a_stack_has_the_mean_interference_and_the_summed_error() -> None:
    matrices = differences(4)
    stacks = [torch.stack(matrices[:2]), torch.stack(matrices[2:])]
    parts = [leading(stack, 12) for stack in stacks]
    alone = [
        interference(pair_interferences([leading(m[None], 12) for m in pair], RANKS))
        for pair in zip(*stacks, strict=True)
    ]
    found = interference(pair_interferences(parts, RANKS))
    assert torch.allclose(found, sum(alone) / 2)
    norms = torch.stack([stack.square().sum(dim=(1, 2)) for stack in stacks])
    each = [
        reconstruction_errors([leading(m[None], 12)], m.square().sum()[None, None], RANKS)
        for m in matrices
    ]
    assert torch.allclose(reconstruction_errors(parts, norms, RANKS), sum(each), atol=1e-9)


def test_equal_models_interfere_most_and_models_of_other_inputs_not_at_all() -> None:
    left, right = torch.zeros(2, 6, 10, dtype=torch.float64)
    left[:, :5] = random(6, 5, dtype=torch.float64)
    right[:, 5:] = random(6, 5, seed=1, dtype=torch.float64)
    apart = [leading(left[None], 4), leading(right[None], 4)]
    assert interference(pair_interferences(apart, [4])).tolist() == pytest.approx([0], abs=1e-7)
    one = leading(with_spectrum(torch.ones(1), 1, 10, dtype=torch.float64)[None], 1)
    assert interference(pair_interferences([one] * 3, [1])).tolist() == pytest.approx([6])


def test_a_model_that_does_not_differ_interferes_with_none() -> None:
    matrices = [*differences(2), torch.zeros(12, 20, dtype=torch.float64)]
    pairs = pair_interferences([leading(matrix[None], 3) for matrix in matrices], [3])[0, 0]
    assert pairs[2].tolist() == [0, 0, 0]
    assert bool(torch.isfinite(pairs).all())
    assert pairs[0, 1] > 0


def test_models_of_unlike_ranks_are_compared_by_what_each_has() -> None:
    matrices = differences(2)
    parts = [leading(matrices[0][None], 2), leading(matrices[1][None], 6)]
    found = pair_interferences(parts, [6])[0, 0, 0, 1]
    expected = (rows(matrices[0], 2) @ rows(matrices[1], 6).mT).norm()
    assert float(found) == pytest.approx(float(expected), rel=1e-9)


def test_effective_rank_is_one_for_one_direction_and_all_for_a_flat_spectrum() -> None:
    flat, one = torch.ones(7, dtype=torch.float64), torch.tensor([3.0, 0, 0], dtype=torch.float64)
    assert float(effective_rank(flat, flat.sum(), 7)) == pytest.approx(7)
    assert float(effective_rank(one, one.sum(), 3)) == pytest.approx(1)
    assert float(effective_rank(torch.zeros(3), torch.zeros(()), 3)) == 0


def test_effective_rank_of_leading_directions_is_an_upper_bound_that_closes() -> None:
    squares = power_law(40, 1.5)
    exact = float(effective_rank(squares, squares.sum(), 40))
    bounds = [float(effective_rank(squares[:k], squares.sum(), 40)) for k in (2, 5, 10, 20)]
    assert bounds == sorted(bounds, reverse=True)
    assert exact <= bounds[-1] <= 1.001 * exact


def test_cancellation_tells_opposite_orthogonal_and_equal_differences() -> None:
    assert cancellation(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])) == 0
    assert cancellation(torch.eye(3)) == 1
    assert cancellation(torch.ones(3, 3)) == 3
    assert cancellation(torch.zeros(2, 2)) == 0


def test_cancellation_with_weights_is_that_of_the_dense_formula() -> None:
    weights, matrices = [2.0, 0.7, 0.3], [random(5, 4, seed=seed).double() for seed in range(3)]
    inner = torch.stack([torch.stack([(a * b).sum() for b in matrices]) for a in matrices])
    total = sum(w * one for w, one in zip(weights, matrices, strict=True)).square().sum()
    alone = sum(w * one.square().sum() for w, one in zip(weights, matrices, strict=True))
    assert cancellation(inner, weights) == pytest.approx(float(total / alone), rel=1e-12)


def test_what_answers_judges_is_the_interference_on_stand_in_inputs() -> None:
    matrices = differences()
    parts = [leading(matrix[None], 5) for matrix in matrices]
    merged = sum(matrices) / 4
    # Beyond the part's directions a difference does not act on its stand-ins.
    errors = [merged[None] - matrix[None] for matrix in matrices]
    expected = task_interferences(errors, [stand_in_inputs(part) for part in parts])
    assert torch.allclose(answers(parts, merged[None]).beside, expected, rtol=1e-9)


def test_interference_is_that_of_the_dense_formula() -> None:
    merged, weights = random(4, 6), [random(4, 6, seed=1), random(4, 6, seed=2)]
    inputs = [random(6, 5, seed=3), random(6, 9, seed=4)]
    expected = [
        sum(float(((merged - w) @ x[:, i]).square().sum()) for i in range(x.shape[1]))
        for w, x in zip(weights, inputs, strict=True)
    ]
    found = task_interferences([merged - weight for weight in weights], inputs)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_inputs_are_written_as_rows_and_a_rest() -> None:
    part = leading(differences(1)[0], 4)
    coefficients = random(4, 6, dtype=torch.float64)
    inputs = stand_in_inputs(LowRank(part.U[None], part.S[None], part.Vh[None]))[0] @ coefficients
    outside = random(20, 6, seed=5, dtype=torch.float64)
    outside -= part.Vh.mT @ (part.Vh @ outside)
    found = fit_inputs(part, inputs + outside)
    assert found.reach == pytest.approx(float(torch.linalg.matrix_norm(coefficients, 2)), rel=1e-8)
    assert found.rest == pytest.approx(float(outside.norm()), rel=1e-8)


def test_inputs_of_a_model_that_does_not_differ_are_all_rest() -> None:
    part = leading(torch.zeros(5, 6, dtype=torch.float64), 2)
    inputs = random(6, 3, dtype=torch.float64)
    assert fit_inputs(part, inputs) == Fit(0.0, pytest.approx(float(inputs.norm())))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 5),
    sides=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    rank=st.integers(1, 12),
    lambda_=st.floats(0, 4),
    outside=st.floats(0, 3),
    centred=st.booleans(),
    alike=st.floats(0, 1),
)
def test_no_interference_is_above_its_bound(
    seed: int,
    count: int,
    sides: tuple[int, int],
    rank: int,
    lambda_: float,
    outside: float,
    centred: bool,
    alike: float,
) -> None:
    m, n = sides
    common = random(m, n, seed=seed, dtype=torch.float64)
    matrices = [
        alike * common + random(m, n, seed=seed + t + 1, dtype=torch.float64) for t in range(count)
    ]
    if centred:
        mean = sum(matrices) / count
        matrices = [matrix - mean for matrix in matrices]
    parts = [leading(matrix, min(rank, m, n)) for matrix in matrices]
    inputs = [
        part.Vh.mT @ random(part.rank, 7, seed=seed + 50 + t, dtype=torch.float64)
        + outside * random(n, 7, seed=seed + 90 + t, dtype=torch.float64)
        for t, part in enumerate(parts)
    ]
    merged = lambda_ * sum(part.dense() for part in parts)
    errors = [merged - matrix for matrix in matrices]
    found = task_interferences(errors, inputs)
    fits = [fit_inputs(part, columns) for part, columns in zip(parts, inputs, strict=True)]
    bound = interference_bound(parts, energies(matrices), lambda_, fits)
    slack = 1e-9 * float(energies(matrices).sum() + 1) * (1 + lambda_) ** 2 * 100
    assert bool((found <= bound * (1 + 1e-6) + slack).all()), (found, bound)


def test_the_bound_is_met_where_one_other_model_has_one_direction() -> None:
    """Not slack by construction: with two models of one common row it is what is lost."""
    row = torch.zeros(1, 6, dtype=torch.float64)
    row[0, 2] = 1
    one, other = (random(4, 1, seed=seed, dtype=torch.float64) @ row for seed in (0, 1))
    parts = [leading(matrix, 1) for matrix in (one, other)]
    inputs = [stand_in_inputs(LowRank(p.U[None], p.S[None], p.Vh[None]))[0] for p in parts]
    found = task_interferences([other, one], inputs)  # M = one + other
    bound = interference_bound(parts, energies([one, other]))
    assert bound.tolist() == pytest.approx(found.tolist(), rel=1e-9)
    # The paper's form, for inputs within the rows: the largest norm, times I(k), squared.
    stacks = [LowRank(p.U[None], p.S[None], p.Vh[None]) for p in parts]
    paper = energies([one, other]).max() * interference(pair_interferences(stacks, [1]))[0] ** 2
    assert float(found.sum()) <= float(paper)
