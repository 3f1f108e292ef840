"""Unusual matrices, stacks, dtypes and seeds, and the factors that come out."""

from __future__ import annotations

import pytest
import torch

from cart_plugin.errors import CartError
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import SOLVERS, truncated_svd
from tests.linalg.helpers import ACCURATE, FAST_BAR, is_accurate
from tests.support import (
    ROUNDING,
    best_approximation,
    low_rank_plus_noise,
    power_law,
    random,
    rank_deficient,
    relative_error,
    with_spectrum,
)


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


@pytest.mark.parametrize("svd", ACCURATE)
def test_a_zero_matrix_in_a_stack_harms_nobody(svd: str) -> None:
    x = torch.stack([torch.zeros(80, 90), random(80, 90)])
    factors = is_accurate(x, 5, svd)
    assert torch.equal(factors.dense()[0], torch.zeros(80, 90))


def test_matrices_of_a_stack_are_decomposed_as_if_alone() -> None:
    x = torch.stack([with_spectrum(low_rank_plus_noise(90), 90, 90, seed=i) for i in range(3)])
    for svd in SOLVERS:
        stacked = truncated_svd(x, RankRule(rank=6), svd=svd, seed=3)
        for matrix, found in zip(x, stacked.dense(), strict=True):
            alone = truncated_svd(matrix, RankRule(rank=6), svd=svd, seed=3)
            assert relative_error(found, alone.dense()) <= ROUNDING


def test_a_matrix_of_low_rank_in_a_stack_is_right() -> None:
    good = with_spectrum(power_law(320, 0.8), 320, 400)
    low = random(320, 4) @ random(4, 400, seed=1) / 100
    found = truncated_svd(torch.stack([good, low]), RankRule(rank=25), svd="fast").dense()
    exact = truncated_svd(good, RankRule(rank=25), svd="exact").dense()
    assert relative_error(found[0], exact.double()) < 1e-3
    assert relative_error(found[1], low.double()) < 1e-5


@pytest.mark.parametrize("svd", SOLVERS)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 3), (0, 3, 4)], ids=str)
def test_empty_matrices_have_empty_factors(svd: str, shape: tuple[int, ...]) -> None:
    for rule in (RankRule(), RankRule(energy=0.5)):
        assert truncated_svd(torch.zeros(shape), rule, svd=svd).dense().shape == shape


@pytest.mark.parametrize("svd", ACCURATE)
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


@pytest.mark.parametrize("svd", ACCURATE)
def test_noncontiguous_input_gives_the_same_matrix(svd: str) -> None:
    x = random(200, 150)
    strided = torch.empty(400, 300)[::2, ::2].copy_(x)
    for view in (strided, x.mT.contiguous().mT):
        assert not view.is_contiguous()
        found = truncated_svd(view, RankRule(rank=10), svd=svd).dense()
        assert relative_error(found, best_approximation(x, 10)) <= FAST_BAR


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


def test_input_that_is_no_matrix_is_refused() -> None:
    with pytest.raises(CartError, match=r"takes matrices, got a tensor of shape \(4,\)"):
        truncated_svd(torch.zeros(4), RankRule())
    with pytest.raises(CartError, match=r"takes matrices, got a tensor of shape \(1, 2, 3, 4\)"):
        truncated_svd(torch.zeros(1, 2, 3, 4), RankRule())


def test_unknown_solver_is_refused_with_the_list_of_solvers() -> None:
    with pytest.raises(
        CartError, match="svd must be one of auto, exact, fast, subspace, sketch, got 'quick'"
    ):
        truncated_svd(torch.zeros(4, 4), RankRule(), svd="quick")
