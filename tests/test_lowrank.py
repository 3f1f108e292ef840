"""Rank rules, and every solver against a full SVD in double precision."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cart_plugin import gram
from cart_plugin.errors import CartError
from cart_plugin.krylov import leading_subspace
from cart_plugin.lowrank import FAST_TOLERANCE, SOLVERS, LowRank, RankRule, truncated_svd
from tests.support import (
    ROUNDING,
    SPECTRA,
    Reference,
    best_approximation,
    low_rank_plus_noise,
    power_law,
    random,
    rank_deficient,
    relative_error,
    repeated,
    separated,
    with_spectrum,
)

EXACT_BAR, FAST_BAR = 1e-5, 1e-3  # what the solvers promise: relative error (Frobenius)


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


def is_accurate(x: Tensor, k: int, svd: str, reference: Reference | None = None) -> LowRank:
    """Assert that a solver gives the truncated matrix, or one that is as good."""
    reference = reference or Reference(x)
    before = x.clone()
    factors = truncated_svd(x, RankRule(rank=k), svd=svd)
    assert torch.equal(x, before)
    assert factors.rank == k
    assert factors.U.shape == (*x.shape[:-1], k)
    assert factors.Vh.shape == (*x.shape[:-2], k, x.shape[-1])
    dense = factors.dense()
    bar = EXACT_BAR if svd == "exact" else FAST_BAR
    if reference.separates(k):
        assert relative_error(dense, reference.best(k)) <= bar, (svd, k)
    assert reference.excess_energy(dense, k) <= 1e-4, (svd, k)
    steps = factors.S.diff(dim=-1)
    assert float(steps.max() if k > 1 else 0) <= 1e-6 * float(factors.S.max())
    assert float(factors.S.min()) >= 0
    return factors


@pytest.mark.parametrize("svd", SOLVERS)
@pytest.mark.parametrize("name", SHAPED)
def test_any_shape_is_accurate_at_any_rank(svd: str, name: str) -> None:
    x = shaped(name)
    reference = Reference(x)
    for k in ranks_of(x):
        is_accurate(x, k, svd, reference)


@pytest.mark.parametrize("svd", SOLVERS)
@pytest.mark.parametrize("shape", [(160, 200), (240, 128)], ids=["wide", "tall"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_any_spectrum_is_accurate_at_any_rank(
    svd: str, shape: tuple[int, int], spectrum: str
) -> None:
    x, reference = case(spectrum, shape)
    for k in ranks_of(x):
        is_accurate(x, k, svd, reference)


@pytest.mark.slow
@pytest.mark.parametrize("svd", SOLVERS)
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
    truth = max(truth, ROUNDING)
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


@pytest.mark.parametrize("svd", ["exact", "auto"])
def test_estimated_error_of_exact_is_within_its_promise(svd: str) -> None:
    for spectrum in SPECTRA.values():
        x = with_spectrum(spectrum(100), 100, 140)
        for k in (1, 8, 40, 90, 100):
            factors = truncated_svd(x, RankRule(rank=k), svd=svd)
            assert 0 <= factors.error <= EXACT_BAR


@pytest.mark.parametrize("multiplicity", [2, 5, 40, 320])
@pytest.mark.parametrize("svd", SOLVERS)
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
    monkeypatch.setattr(gram, "_PARTIAL_SIDE", 1)
    for shape in [(160, 200), (200, 200), (70, 300)]:
        x, reference = case(spectrum, shape)
        for k in (1, 3, 5, 12, 30):
            factors = is_accurate(x, k, "exact", reference)
            assert torch.allclose(factors.U.mT @ factors.U, torch.eye(k), atol=1e-5)


@pytest.mark.parametrize("svd", SOLVERS)
@pytest.mark.parametrize("exponent", [-25, -18, 0, 18, 25])
def test_entries_of_any_magnitude_keep_the_accuracy(svd: str, exponent: int) -> None:
    x = with_spectrum(power_law(96, 1), 96, 96) * 10.0**exponent
    is_accurate(x, 6, svd)
    is_accurate(x, 90, svd)


@pytest.mark.parametrize("svd", SOLVERS)
def test_entries_below_the_normal_range_give_finite_factors(svd: str) -> None:
    x = with_spectrum(rank_deficient(16, 3), 16, 16) * 1e-39
    factors = truncated_svd(x, RankRule(rank=3), svd=svd)
    assert relative_error(factors.dense(), x) <= 1e-3  # all that their few bits allow


@pytest.mark.parametrize("svd", SOLVERS)
@pytest.mark.parametrize("rule", [RankRule(), RankRule(rank=5), RankRule(energy=0.9)], ids=repr)
def test_zeros_stay_zeros(svd: str, rule: RankRule) -> None:
    for shape in [(60, 80), (2, 60, 80)]:
        factors = truncated_svd(torch.zeros(shape), rule, svd=svd)
        assert torch.equal(factors.dense(), torch.zeros(shape))
        assert factors.rank == (rule.fixed_rank(60, 80) or 1)


@pytest.mark.parametrize("svd", SOLVERS)
def test_a_zero_matrix_in_a_stack_harms_nobody(svd: str) -> None:
    x = torch.stack([torch.zeros(80, 90), random(80, 90)])
    factors = is_accurate(x, 5, svd)
    assert torch.equal(factors.dense()[0], torch.zeros(80, 90))


@pytest.mark.parametrize("svd", SOLVERS)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 3), (0, 3, 4)], ids=str)
def test_empty_matrices_have_empty_factors(svd: str, shape: tuple[int, ...]) -> None:
    for rule in (RankRule(), RankRule(energy=0.5)):
        assert truncated_svd(torch.zeros(shape), rule, svd=svd).dense().shape == shape


@pytest.mark.parametrize("svd", SOLVERS)
def test_double_precision_is_kept(svd: str) -> None:
    x = random(70, 90, dtype=torch.float64)
    factors = truncated_svd(x, RankRule(rank=20), svd=svd)
    assert {factors.U.dtype, factors.S.dtype, factors.Vh.dtype} == {torch.float64}
    bar = 1e-10 if svd == "exact" else FAST_BAR
    assert relative_error(factors.dense(), best_approximation(x, 20)) <= bar


@pytest.mark.parametrize("svd", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_decomposed_in_single(svd: str, dtype: torch.dtype) -> None:
    x = random(70, 90, dtype=dtype)
    factors = truncated_svd(x, RankRule(rank=6), svd=svd)
    single = truncated_svd(x.float(), RankRule(rank=6), svd=svd)
    assert factors.U.dtype == torch.float32
    assert torch.equal(factors.dense(), single.dense())


@pytest.mark.parametrize("svd", SOLVERS)
def test_the_same_seed_gives_the_same_bytes(svd: str) -> None:
    x = with_spectrum(power_law(300, 0.5), 300, 300)
    first, second = (truncated_svd(x, RankRule(rank=16), svd=svd, seed=7) for _ in range(2))
    assert torch.equal(first.U, second.U)
    assert torch.equal(first.S, second.S)
    assert torch.equal(first.Vh, second.Vh)
    assert first.error == second.error


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    x = with_spectrum(power_law(300, 0.5), 300, 300)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = truncated_svd(x, RankRule(rank=16), svd="fast")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first.U, truncated_svd(x, RankRule(rank=16), svd="fast").U)


def test_other_seeds_of_fast_differ_within_its_tolerance() -> None:
    x = with_spectrum(power_law(300, 0.5), 300, 300)
    one, two = (truncated_svd(x, RankRule(rank=16), svd="fast", seed=seed) for seed in (1, 2))
    assert not torch.equal(one.U, two.U)
    assert relative_error(one.dense(), two.dense()) <= 2 * FAST_BAR


@pytest.mark.parametrize("svd", SOLVERS)
def test_noncontiguous_input_gives_the_same_matrix(svd: str) -> None:
    x = random(200, 150)
    strided = torch.empty(400, 300)[::2, ::2].copy_(x)
    for view in (strided, x.mT.contiguous().mT):
        assert not view.is_contiguous()
        found = truncated_svd(view, RankRule(rank=10), svd=svd).dense()
        assert relative_error(found, best_approximation(x, 10)) <= FAST_BAR


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


@pytest.mark.parametrize("svd", SOLVERS)
@pytest.mark.parametrize("shape", [(100, 130), (130, 100), (3, 40, 50)], ids=str)
@pytest.mark.parametrize("spectrum", ["power-0.5", "power-1", "power-2", "low-rank-plus-noise"])
@pytest.mark.parametrize("energy", [0.3, 0.5, 0.9, 0.99, 0.999])
def test_energy_keeps_as_many_directions_as_a_full_svd_says(
    svd: str, shape: tuple[int, ...], spectrum: str, energy: float
) -> None:
    *stack, m, n = shape
    values = SPECTRA[spectrum](min(m, n))
    x = torch.stack([with_spectrum(values, m, n, seed=seed) for seed in range((*stack, 1)[0])])
    x = x.reshape(shape)
    shares = torch.linalg.svdvals(x.double()).square().cumsum(-1)
    reached = shares / shares[..., -1:] >= energy
    expected = reached.int().argmax(-1) + 1
    factors = truncated_svd(x, RankRule(energy=energy), svd=svd)
    assert torch.equal((factors.S > 0).sum(-1), expected)
    assert factors.rank == int(expected.max())
    for index, k in enumerate(expected.reshape(-1).tolist()):
        matrix, found = x.reshape(-1, m, n)[index], factors.dense().reshape(-1, m, n)[index]
        assert relative_error(found, best_approximation(matrix, k)) <= FAST_BAR


def test_energy_of_one_keeps_the_matrix() -> None:
    for values in (power_law(40, 1), power_law(40, 2), rank_deficient(40)):
        x = with_spectrum(values, 40, 50)
        assert relative_error(truncated_svd(x, RankRule(energy=1.0)).dense(), x) <= EXACT_BAR


def test_energy_gives_each_matrix_of_a_stack_its_own_rank() -> None:
    x = torch.stack(
        [with_spectrum(rank_deficient(40, rank), 40, 50) for rank in (2, 9)] + [torch.zeros(40, 50)]
    )
    factors = truncated_svd(x, RankRule(energy=0.9999))
    assert (factors.S > 0).sum(-1).tolist() == [2, 9, 0]
    assert factors.rank == 9
    assert relative_error(factors.dense(), x) <= EXACT_BAR


@pytest.mark.parametrize("rule", [RankRule(rank=0), RankRule(rank_ratio=0.0)], ids=repr)
def test_rank_zero_keeps_nothing(rule: RankRule) -> None:
    factors = truncated_svd(random(5, 6), rule)
    assert rule.keeps_nothing
    assert factors.rank == 0
    assert torch.equal(factors.dense(), torch.zeros(5, 6))


@pytest.mark.parametrize(
    ("rule", "shape", "expected"),
    [
        (RankRule(), (100, 300), 8),
        (RankRule(), (768, 768), 61),
        (RankRule(), (12, 300), 1),  # floor(0.96) would keep nothing
        (RankRule(rank_ratio=0.16), (100, 300), 16),
        (RankRule(rank_ratio=0.16), (300, 100), 16),
        (RankRule(rank_ratio=0.999), (100, 100), 99),
        (RankRule(rank_ratio=1.0), (100, 300), 100),
        (RankRule(rank_ratio=0.0), (100, 300), 0),
        (RankRule(rank_ratio=1e-9), (100, 300), 1),
        (RankRule(rank=7), (100, 300), 7),
        (RankRule(rank=7), (5, 300), 5),
        (RankRule(rank=7), (300, 5), 5),
        (RankRule(rank=0), (100, 300), 0),
        (RankRule(rank=7.0), (100, 300), 7),  # type: ignore[arg-type]
        (RankRule(energy=0.5), (100, 300), None),
        (RankRule(energy=0.0), (100, 300), 0),
    ],
    ids=repr,
)
def test_rank_that_a_rule_keeps(
    rule: RankRule, shape: tuple[int, int], expected: int | None
) -> None:
    assert rule.fixed_rank(*shape) == expected
    assert rule.keeps_nothing == (expected == 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank_ratio": -1}, "rank_ratio must lie between 0 and 1, got -1"),
        ({"rank_ratio": 2}, "rank_ratio must lie between 0 and 1, got 2"),
        ({"rank_ratio": math.nan}, "rank_ratio must lie between 0 and 1, got nan"),
        ({"rank": -1}, "rank must be 0 or a positive whole number, got -1"),
        ({"rank": 2.5}, r"rank must be 0 or a positive whole number, got 2\.5"),
        ({"rank": math.nan}, "rank must be 0 or a positive whole number, got nan"),
        ({"rank": math.inf}, "rank must be 0 or a positive whole number, got inf"),
        ({"rank": True}, "rank must be a number, got True"),
        ({"rank_ratio": "8 %"}, "rank_ratio must be a number, got '8 %'"),
        ({"energy": -0.1}, r"energy must lie between 0 and 1, got -0\.1"),
        ({"energy": 1.5}, r"energy must lie between 0 and 1, got 1\.5"),
        ({"energy": math.nan}, "energy must lie between 0 and 1, got nan"),
        ({"rank": 4, "energy": 0.5}, r"rank=4 and energy=0\.5 are two rank rules at once"),
        ({"rank_ratio": 0.1, "rank": 4}, r"rank_ratio=0\.1 and rank=4 are two rank rules"),
        ({"rank_ratio": 0.0, "energy": 1}, r"rank_ratio=0\.0 and energy=1 are two rank rules"),
    ],
    ids=repr,
)
def test_rank_rules_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CartError, match=message):
        RankRule(**values)


def test_input_that_is_no_matrix_is_refused() -> None:
    with pytest.raises(CartError, match=r"takes matrices, got a tensor of shape \(4,\)"):
        truncated_svd(torch.zeros(4), RankRule())
    with pytest.raises(CartError, match=r"takes matrices, got a tensor of shape \(1, 2, 3, 4\)"):
        truncated_svd(torch.zeros(1, 2, 3, 4), RankRule())


def test_unknown_solver_is_refused_with_the_list_of_solvers() -> None:
    with pytest.raises(CartError, match="svd must be one of auto, exact, fast, got 'quick'"):
        truncated_svd(torch.zeros(4, 4), RankRule(), svd="quick")


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (3, 6, 9)], ids=str)
def test_factors_multiply_transpose_and_add(shape: tuple[int, ...]) -> None:
    factors = truncated_svd(random(*shape), RankRule(rank=2))
    dense = (factors.U @ torch.diag_embed(factors.S)) @ factors.Vh
    assert torch.allclose(factors.dense(), dense, atol=1e-6)
    assert torch.allclose(factors.mT.dense(), dense.mT, atol=1e-6)
    assert factors.mT.error == factors.error
    out = random(*shape, seed=1)
    expected = out - 2.5 * dense
    assert factors.add_to_(out, -2.5) is out
    assert torch.allclose(out, expected, atol=1e-5)


def test_gradients_are_not_recorded() -> None:
    x = random(20, 30).requires_grad_()
    assert not truncated_svd(x, RankRule(rank=3)).dense().requires_grad


def test_matrices_of_a_stack_are_decomposed_as_if_alone() -> None:
    x = torch.stack([with_spectrum(low_rank_plus_noise(90), 90, 90, seed=i) for i in range(3)])
    for svd in SOLVERS:
        stacked = truncated_svd(x, RankRule(rank=6), svd=svd, seed=3)
        for matrix, found in zip(x, stacked.dense(), strict=True):
            alone = truncated_svd(matrix, RankRule(rank=6), svd=svd, seed=3)
            assert relative_error(found, alone.dense()) <= ROUNDING
