"""The block Krylov iteration answers rightly or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cart_plugin.linalg.krylov import Subspace, leading_subspace
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import truncated_svd
from tests.support import (
    ROUNDING,
    SPECTRA,
    best_approximation,
    excess_energy,
    low_rank_plus_noise,
    power_law,
    random,
    rank_deficient,
    relative_error,
    repeated,
    separated,
    with_spectrum,
)

TOLERANCE = 5e-4


def solved(x: Tensor, k: int, *, seed: int = 0) -> Subspace | None:
    """Solve a matrix or a stack, and assert that an answer is right, if there is one."""
    stack = x if x.ndim == 3 else x[None]
    before = stack.clone()
    found = leading_subspace(stack, k, tolerance=TOLERANCE, seed=seed)
    assert torch.equal(stack, before)
    if found is None:
        return None
    assert found.left.shape == (*stack.shape[:2], k)
    assert found.right.shape == (stack.shape[0], k, stack.shape[2])
    assert found.error <= TOLERANCE
    dense = found.left @ found.right
    for matrix, approximation in zip(stack, dense, strict=True):
        if separated(matrix, k):
            error = relative_error(approximation, best_approximation(matrix, k))
            assert error <= 2 * TOLERANCE
        assert excess_energy(matrix, approximation, k) <= 1e-4
    assert torch.allclose(found.right, found.left.mT @ stack, atol=1e-5 * float(stack.norm()))
    return found


@pytest.mark.parametrize("multiplicity", [2, 7, 8, 9, 16, 40, 100])
@pytest.mark.parametrize("k", [1, 4, 8, 12, 24])
@pytest.mark.parametrize("seed", [0, 1])
def test_repeated_values_are_all_found_or_nothing_is_returned(
    multiplicity: int, k: int, seed: int
) -> None:
    """A block of 8 vectors meets at most 8 directions of one singular value."""
    solved(with_spectrum(repeated(240, multiplicity), 240, 260), k, seed=seed)


@pytest.mark.parametrize("multiplicity", [20, 60])
def test_a_block_that_cannot_hold_the_leading_directions_is_noticed(multiplicity: int) -> None:
    """Only the noise that takes the place of exhausted directions can find the others."""
    values = torch.full((240,), 1e-4, dtype=torch.float64)
    values[:multiplicity] = 1.0
    x = with_spectrum(values, 240, 240)
    found = solved(x, 16)
    if found is not None:
        assert torch.allclose(found.right.norm(dim=-1), torch.ones(16), rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 7, 8, 9, 30])
@pytest.mark.parametrize("k", [1, 2, 7, 8, 20, 32])
def test_rank_deficient_matrices_are_right_or_left_to_others(rank: int, k: int) -> None:
    solved(with_spectrum(rank_deficient(300, rank), 300, 320), k)


def test_a_matrix_of_rank_below_the_block_is_solved() -> None:
    x = with_spectrum(rank_deficient(300, 3), 300, 320)
    found = solved(x, 2)
    assert found is not None
    assert found.error <= 10 * ROUNDING


def test_zeros_do_not_become_anything_else() -> None:
    found = leading_subspace(torch.zeros(2, 300, 300), 8, tolerance=TOLERANCE, seed=0)
    if found is not None:
        assert torch.equal(found.left @ found.right, torch.zeros(2, 300, 300))


@pytest.mark.parametrize("k", [60, 120, 239, 240])
def test_flat_spectra_do_not_converge_for_many_directions(k: int) -> None:
    assert solved(random(240, 260), k) is None
    assert solved(with_spectrum(torch.ones(240), 240, 240), k) is None


@pytest.mark.parametrize("shape", [(1, 50), (2, 2), (20, 30), (50, 50)], ids=str)
def test_small_matrices_are_left_to_others(shape: tuple[int, int]) -> None:
    assert solved(random(*shape), 1) is None


@pytest.mark.parametrize("exponent", [0.5, 1, 2, 4, 8])
@pytest.mark.parametrize("k", [1, 5, 16, 24])
def test_decaying_spectra_are_solved(exponent: float, k: int) -> None:
    x = with_spectrum(power_law(300, exponent), 300, 340)
    for seed in range(3):
        found = solved(x, k, seed=seed)
        if exponent <= 2 and k <= 16:
            assert found is not None


@pytest.mark.parametrize("base", [0.5, 0.1])
def test_spectra_that_fall_below_rounding_stay_right(base: float) -> None:
    """The weakest of the kept directions are lost in the rounding of fp32."""
    solved(with_spectrum(base ** torch.arange(300, dtype=torch.float64), 300, 300), 16)


def test_outliers_over_noise_are_solved() -> None:
    assert solved(with_spectrum(low_rank_plus_noise(400), 400, 400), 8) is not None


def test_stack_is_as_accurate_as_its_hardest_matrix() -> None:
    x = torch.stack(
        [
            with_spectrum(SPECTRA[spectrum](256), 256, 256, seed=seed)
            for seed, spectrum in enumerate(["power-0.5", "power-2", "low-rank-plus-noise"])
        ]
    )
    found = solved(x, 8)
    assert found is not None
    alone = [solved(matrix, 8) for matrix in x]
    assert found.error >= max(one.error for one in alone if one is not None) / 10


def test_a_stack_with_one_that_does_not_converge_is_not_solved() -> None:
    easy = with_spectrum(power_law(256, 1), 256, 256)
    assert solved(torch.stack([easy, easy]), 24) is not None
    assert solved(torch.stack([easy, random(256, 256)]), 24) is None


def test_tighter_tolerance_gives_a_smaller_error() -> None:
    x = with_spectrum(power_law(320, 0.5), 320, 320)
    best = best_approximation(x, 8)
    errors = []
    for tolerance in (1e-2, 1e-3, 1e-4):
        found = leading_subspace(x[None], 8, tolerance=tolerance, seed=0)
        assert found is not None
        errors.append(relative_error((found.left @ found.right)[0], best))
        assert errors[-1] <= 2 * tolerance
    assert errors[2] < errors[0]


def test_same_seed_same_bytes_other_seed_other_start() -> None:
    x = with_spectrum(power_law(320, 0.5), 320, 320)
    one, again, other = (solved(x, 8, seed=seed) for seed in (5, 5, 6))
    assert one is not None
    assert again is not None
    assert other is not None
    assert torch.equal(one.left, again.left)
    assert torch.equal(one.right, again.right)
    assert not torch.equal(one.left, other.left)


def test_double_precision_is_used_where_given() -> None:
    x = with_spectrum(power_law(320, 1), 320, 320, dtype=torch.float64)
    found = leading_subspace(x[None], 8, tolerance=1e-5, seed=0)
    assert found is not None
    assert found.left.dtype == torch.float64
    assert relative_error((found.left @ found.right)[0], best_approximation(x, 8)) <= 1e-5


@pytest.mark.parametrize("spectrum", ["power-0.5", "power-1", "low-rank-plus-noise"])
def test_left_vectors_are_orthonormal_and_rows_descend(spectrum: str) -> None:
    found = solved(with_spectrum(SPECTRA[spectrum](320), 320, 400), 12)
    assert found is not None
    (left,) = found.left
    assert torch.allclose(left.mT @ left, torch.eye(12), atol=1e-5)
    norms = found.right[0].norm(dim=-1)
    assert float(norms.diff().max()) <= 1e-6 * float(norms[0])


def test_a_zero_matrix_does_not_spoil_the_stack_it_is_in() -> None:
    good = with_spectrum(power_law(320, 0.8), 320, 400)
    found = leading_subspace(
        torch.stack([good, torch.zeros_like(good)]), 25, tolerance=5e-4, seed=0
    )
    assert found is not None
    exact = truncated_svd(good, RankRule(rank=25), svd="exact").dense()
    assert relative_error(found.left[0] @ found.right[0], exact.double()) < 1e-3
    assert not (found.left[1] @ found.right[1]).any()
