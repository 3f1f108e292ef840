"""Every solver against a full SVD in double precision."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from cart_plugin import CartError
from cart_plugin.linalg import gram
from cart_plugin.linalg.krylov import leading_subspace
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import FAST_TOLERANCE, SOLVERS, truncated_svd
from tests.linalg.helpers import ACCURATE, EXACT_BAR, is_accurate
from tests.support import (
    ROUNDING,
    SPECTRA,
    Reference,
    best_approximation,
    power_law,
    random,
    rank_deficient,
    relative_error,
    repeated,
    separated,
    with_spectrum,
)


def ranks_of(x: Tensor) -> list[int]:
    """From a single direction to all of them."""
    full = min(x.shape[-2:])
    shares = {math.floor(share * full) for share in (0.01, 0.08, 0.16, 0.32, 0.5, 0.8)}
    return sorted({1, min(3, full), max(1, full - 1), full, *(shares - {0})})


def shaped(name: str) -> Tensor:
    """A matrix or a stack of a shape that its name describes."""
    return {
        "square": random(128, 128),
        "tall": random(300, 70),
        "wide": random(70, 300),
        "one-row": random(1, 50),
        "one-column": random(50, 1),
        "one-entry": random(1, 1),
        "two-by-two": random(2, 2),
        "stack": random(3, 64, 96),
        "tall-stack": random(3, 96, 64),
        "stack-of-one": random(1, 40, 40),
        "stack-of-different-spectra": torch.stack(
            [
                with_spectrum(SPECTRA[name](96), 96, 128, seed=seed)
                for seed, name in enumerate(["power-1", "rank-deficient", "power-0.5"])
            ]
        ),
    }[name]


SHAPED = [
    "square",
    "tall",
    "wide",
    "one-row",
    "one-column",
    "one-entry",
    "two-by-two",
    "stack",
    "tall-stack",
    "stack-of-one",
    "stack-of-different-spectra",
]


@cache
def case(spectrum: str, shape: tuple[int, int]) -> tuple[Tensor, Reference]:
    """A matrix, and its decomposition in double precision, which takes longest."""
    x = with_spectrum(SPECTRA[spectrum](min(shape)), *shape)
    return x, Reference(x)


@pytest.mark.parametrize("svd", ACCURATE)
@pytest.mark.parametrize("name", SHAPED)
def test_any_shape_is_accurate_at_any_rank(svd: str, name: str) -> None:
    x = shaped(name)
    reference = Reference(x)
    for k in ranks_of(x):
        is_accurate(x, k, svd, reference)


@pytest.mark.parametrize("svd", ACCURATE)
@pytest.mark.parametrize("shape", [(160, 200), (240, 128)], ids=["wide", "tall"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_any_spectrum_is_accurate_at_any_rank(
    svd: str, shape: tuple[int, int], spectrum: str
) -> None:
    x, reference = case(spectrum, shape)
    for k in ranks_of(x):
        is_accurate(x, k, svd, reference)


@pytest.mark.slow
@pytest.mark.parametrize("svd", [name for name in ACCURATE if name != "subspace"])
@pytest.mark.parametrize("shape", [(768, 768), (512, 1536), (1100, 600)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_layers_of_real_size_are_accurate(svd: str, shape: tuple[int, int], spectrum: str) -> None:
    x, reference = case(spectrum, shape)
    for ratio in (0.01, 0.08, 0.16, 0.32):
        is_accurate(x, math.floor(ratio * min(shape)), svd, reference)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("share", [0.01, 0.04, 0.08, 0.12])
def test_fast_knows_its_error_within_a_factor_of_ten(spectrum: str, share: float) -> None:
    x = with_spectrum(SPECTRA[spectrum](320), 320, 400)
    k = math.floor(share * 320)
    subspace = leading_subspace(x[None], k, tolerance=FAST_TOLERANCE, seed=0)
    if subspace is None or not separated(x, k):
        return  # left to the exact solver; or with more than one best matrix
    truth = relative_error((subspace.left @ subspace.right)[0], best_approximation(x, k))
    truth = max(truth, 2 * ROUNDING)  # the residuals are rounded, too
    assert truth / 10 <= subspace.error <= 10 * truth
    assert subspace.error <= FAST_TOLERANCE
    assert truncated_svd(x, RankRule(rank=k), svd="fast").error == subspace.error


@pytest.mark.parametrize("spectrum", ["power-0.5", "power-1", "low-rank-plus-noise"])
def test_fast_is_not_just_another_name_of_exact(spectrum: str) -> None:
    x = with_spectrum(SPECTRA[spectrum](320), 320, 320)
    k = 8
    assert leading_subspace(x[None], k, tolerance=FAST_TOLERANCE, seed=0) is not None
    fast = truncated_svd(x, RankRule(rank=k), svd="fast")
    exact = truncated_svd(x, RankRule(rank=k), svd="exact")
    assert not torch.equal(fast.dense(), exact.dense())


@pytest.mark.cpu_only  # `auto` takes small matrices for `exact`
@pytest.mark.parametrize("svd", ["exact", "auto"])
def test_estimated_error_of_exact_is_within_its_promise(svd: str) -> None:
    for spectrum in SPECTRA.values():
        x = with_spectrum(spectrum(100), 100, 140)
        for k in (1, 8, 40, 90, 100):
            factors = truncated_svd(x, RankRule(rank=k), svd=svd)
            assert 0 <= factors.error <= EXACT_BAR


@pytest.mark.parametrize("multiplicity", [2, 5, 40, 320])
@pytest.mark.parametrize("svd", ACCURATE)
def test_equal_singular_values_are_all_found(svd: str, multiplicity: int) -> None:
    x = with_spectrum(repeated(320, multiplicity), 320, 320)
    reference = Reference(x)
    for k in (1, 3, 5, 16, 40, 160, 319):
        factors = is_accurate(x, k, svd, reference)
        assert torch.allclose(factors.U.mT @ factors.U, torch.eye(k), atol=1e-5)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_partial_eigensolver_of_large_matrices_is_as_accurate(
    spectrum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It returns too few vectors of a cluster of equal values, which has to be noticed."""
    monkeypatch.setattr(gram, "PARTIAL_SIDE", 1)
    for shape in [(160, 200), (200, 200), (70, 300)]:
        x, reference = case(spectrum, shape)
        for k in (1, 3, 5, 12, 30):
            factors = is_accurate(x, k, "exact", reference)
            assert torch.allclose(factors.U.mT @ factors.U, torch.eye(k), atol=1e-5)


def test_steep_spectra_are_exact_whatever_the_processor() -> None:
    """One power step left 1.5e-5 here with an AMD EPYC's LAPACK, and less with an Intel Xeon's."""
    x = with_spectrum(power_law(1024, 1.5), 1024, 1024, seed=1)
    is_accurate(x, 30, "exact")


@pytest.mark.parametrize("svd", ACCURATE)
@pytest.mark.parametrize("exponent", [-25, -18, 0, 18, 25])
def test_entries_of_any_magnitude_keep_the_accuracy(svd: str, exponent: int) -> None:
    x = with_spectrum(power_law(96, 1), 96, 96) * 10.0**exponent
    is_accurate(x, 6, svd)
    is_accurate(x, 90, svd)


@pytest.mark.parametrize("svd", SOLVERS)
@pytest.mark.parametrize("shape", [(120, 300), (300, 120), (3, 80, 100), (3, 100, 80)], ids=str)
@pytest.mark.parametrize("k", [1, 8, 60])
def test_singular_vectors_are_orthonormal(svd: str, shape: tuple[int, ...], k: int) -> None:
    factors = truncated_svd(random(*shape), RankRule(rank=k), svd=svd)
    for vectors in (factors.U, factors.Vh.mT):
        assert torch.allclose(vectors.mT @ vectors, torch.eye(k), atol=1e-4)


@pytest.mark.parametrize("svd", SOLVERS)
@pytest.mark.parametrize("k", [3, 7, 20, 64])
def test_short_side_vectors_are_orthonormal_beyond_the_rank_of_the_matrix(svd: str, k: int) -> None:
    x = with_spectrum(rank_deficient(128), 128, 140)
    assert torch.allclose(
        (u := truncated_svd(x, RankRule(rank=k), svd=svd).U).mT @ u, torch.eye(k), atol=1e-5
    )


@pytest.mark.parametrize("svd", ACCURATE)
@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_matrices_with_few_rows_that_are_not_zero_are_solved(svd: str, share: float) -> None:
    """LAPACK's divide and conquer gives up on some: partly frozen layers, in bf16."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x = random(300, 300, seed=seed) * (torch.rand(300, 1, generator=generator) < share)
        reference = Reference(x)
        for k in (4, 12):
            is_accurate(x, k, svd, reference)
        assert truncated_svd(x, RankRule(energy=0.5), svd=svd).rank > 1


@pytest.mark.parametrize(
    ("multiplicity", "decay", "k"), [(24, 0.1, 24), (33, 0.3, 33), (9, 0.3, 9)]
)
def test_values_repeated_more_often_than_a_block_holds_are_found(
    multiplicity: int, decay: float, k: int
) -> None:
    values = (1 + torch.arange(400, dtype=torch.float64) // multiplicity) ** -decay
    x = with_spectrum(values, 400, 440)
    assert separated(x, k)
    is_accurate(x, k, "fast", Reference(x))


@pytest.mark.parametrize("k", [8, 20, 45])
def test_fast_solves_the_differences_of_merged_adapters_itself(k: int) -> None:
    """Models with merged LoRA adapters differ by matrices of exactly low rank."""
    x = with_spectrum(power_law(400, 0.5) * (torch.arange(400) < 64), 400, 440)
    found = leading_subspace(x[None], k, tolerance=FAST_TOLERANCE, seed=0)
    assert found is not None
    truth = best_approximation(x, k)
    assert relative_error((found.left @ found.right)[0], truth) <= FAST_TOLERANCE


def test_fast_solves_matrices_of_lower_rank_than_asked_for() -> None:
    x = with_spectrum(rank_deficient(400, 16), 400, 440)
    found = leading_subspace(x[None], 40, tolerance=FAST_TOLERANCE, seed=0)
    assert found is not None
    assert relative_error((found.left @ found.right)[0], x) <= 10 * ROUNDING


@pytest.mark.parametrize("seed", range(4))
def test_a_steep_head_over_a_slow_tail_is_as_exact_as_promised(seed: int) -> None:
    number = torch.arange(1, 401, dtype=torch.float64)
    x = with_spectrum(number**-1 + 10 ** (-number / 2), 400, 480, seed=seed)
    is_accurate(x, 30, "exact", Reference(x))


def test_values_close_to_the_largest_number_are_solved() -> None:
    x = random(50, 60)
    x[0, 0] = 2e38
    assert truncated_svd(x, RankRule(rank=1)).S[0] == pytest.approx(2e38, rel=1e-5)


def test_a_number_in_the_place_of_a_rule_is_refused() -> None:
    with pytest.raises(CartError, match=r"RankRule\(rank=8\)"):
        truncated_svd(random(6, 8), 8)  # type: ignore[arg-type]


def test_exact_never_claims_less_than_rounding() -> None:
    x = with_spectrum(power_law(60, 0.5), 60, 80)
    for k in (2, 20, 50, 60):
        assert truncated_svd(x, RankRule(rank=k), svd="exact").error >= 1e-6
