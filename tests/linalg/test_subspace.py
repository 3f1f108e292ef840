"""Subspace iteration: near the best in energy, whatever the spectrum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cart_plugin import CartSettings
from cart_plugin.linalg import subspace
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.subspace import GAIN, near_subspace, oversampled
from cart_plugin.linalg.svd import truncated_svd
from cart_plugin.merging.cart import merge_tensors
from cart_plugin.merging.differences import truncated
from cart_plugin.merging.least_interference import least_interference
from tests.devices import DEVICE
from tests.support import SPECTRA, power_law, random, rank_deficient, relative_error, with_spectrum


def lost(x: Tensor, right: Tensor) -> float:
    """Share of the energy of the best directions that others do not capture."""
    best = torch.linalg.svdvals(x.double())[: right.shape[-2]].square().sum()
    return 1 - float(right.double().square().sum() / best)


def close_to_orthonormal(columns: Tensor) -> bool:
    return torch.allclose(columns.mT @ columns, torch.eye(columns.shape[-1]), atol=2e-5)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(160, 200), (200, 200), (130, 500)], ids=str)
def test_decaying_spectra_lose_two_thousandths_at_most(
    spectrum: str, shape: tuple[int, int]
) -> None:
    x = with_spectrum(SPECTRA[spectrum](shape[0]), *shape)
    for share in (0.01, 0.08, 0.16, 0.3):
        found = near_subspace(x[None], max(1, math.floor(share * shape[0])), seed=0)
        assert lost(x, found.right[0]) <= 0.002
        assert close_to_orthonormal(found.left[0])
        assert torch.allclose(found.left[0].mT @ x, found.right[0], atol=1e-5 * float(x.norm()))


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(160, 200), (130, 500)], ids=str)
def test_a_sketch_loses_little_more_in_fewer_steps(
    spectrum: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = with_spectrum(SPECTRA[spectrum](shape[0]), *shape)
    steps = []
    times = subspace.times_transposed
    monkeypatch.setattr(
        subspace, "times_transposed", lambda *pair: steps.append(pair) or times(*pair)
    )
    for share in (0.08, 0.24):
        rule = RankRule(share)
        whole = near_subspace(x[None], rule.fixed_rank(*shape) or 1, seed=0)
        more = len(steps)
        steps.clear()
        found = truncated_svd(x, rule, svd="sketch")
        assert len(steps) <= min(more, 4)
        steps.clear()
        assert lost(x, found.S[:, None]) <= 0.015
        assert lost(x, whole.right[0]) <= lost(x, found.S[:, None]) + 1e-6
        assert close_to_orthonormal(found.U)


@pytest.mark.parametrize("shape", [(256, 256), (256, 700)], ids=str)
@pytest.mark.parametrize("k", [1, 20, 40, 80])
def test_noise_loses_two_per_cent_at_most(shape: tuple[int, int], k: int) -> None:
    x = random(*shape)
    assert lost(x, near_subspace(x[None], k, seed=0).right[0]) <= 0.02


@pytest.mark.parametrize(("exponent", "most"), [(0.6, 0.002), (0.1, 0.01), (0.0, 0.02)])
def test_large_matrices_lose_little_more(exponent: float, most: float) -> None:
    m, n = 1024, 1280
    x = random(m, n)
    if exponent:  # as `make bench-merge`'s models: no decomposition is needed to make it
        x = (random(m, m, seed=1) * power_law(m, exponent).float()) @ random(m, n, seed=2)
    for k in (8, 163):
        assert lost(x, near_subspace(x[None], k, seed=0).right[0]) <= most


@pytest.mark.parametrize("exponent", [2, 6, 12, 30])
def test_steep_spectra_stay_orthonormal(exponent: int) -> None:
    x = with_spectrum(power_law(200, exponent), 200, 240)
    found = near_subspace(x[None], 32, seed=0)
    assert close_to_orthonormal(found.left[0])
    assert lost(x, found.right[0]) <= 1e-6


def test_fewer_rows_than_directions_are_left_orthonormal() -> None:
    x = torch.zeros(200, 240)
    x[:5] = random(5, 240)
    for matrix in (x, with_spectrum(rank_deficient(200, 3), 200, 240)):
        found = near_subspace(matrix[None], 32, seed=0)
        assert close_to_orthonormal(found.left[0])
        assert relative_error((found.left @ found.right)[0], matrix.double()) <= 1e-5


def test_the_error_is_the_gain_of_the_last_step() -> None:
    for spectrum in SPECTRA.values():
        x = with_spectrum(spectrum(160), 160, 200)
        found = near_subspace(x[None], 16, seed=0)
        assert lost(x, found.right[0]) <= found.error**2 + 1e-6
        assert found.error**2 <= GAIN


def test_matrices_of_a_stack_are_iterated_together_and_one_may_be_zero() -> None:
    x = torch.stack([random(128, 160), torch.zeros(128, 160), random(128, 160, seed=1) * 1e3])
    found = near_subspace(x, 20, seed=0)
    for index in (0, 2):
        assert lost(x[index], found.right[index]) <= 0.02
    assert torch.equal(found.right[1], torch.zeros(20, 160))


def test_double_precision_is_kept_and_seeds_decide() -> None:
    x = random(128, 160, dtype=torch.float64)
    one, same, other = (near_subspace(x[None], 9, seed=seed).left for seed in (1, 1, 2))
    assert one.dtype == torch.float64
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.cpu_only  # an accelerator iterates on small ones, too
def test_small_matrices_are_solved() -> None:
    x = with_spectrum(power_law(160, 0.6), 160, 200)
    exact = truncated_svd(x, RankRule(rank=20), svd="exact")
    assert torch.equal(truncated_svd(x, RankRule(rank=20), svd="subspace").U, exact.U)


def test_large_matrices_are_iterated_on(monkeypatch: pytest.MonkeyPatch) -> None:
    x = with_spectrum(power_law(160, 0.6), 160, 200)
    exact = truncated_svd(x, RankRule(rank=20), svd="exact")
    monkeypatch.setattr("cart_plugin.linalg.svd._FAST_SIDE", 160)
    iterated = truncated_svd(x, RankRule(rank=20), svd="subspace")
    assert 1e-4 < relative_error(iterated.dense(), exact.dense().double()) < 0.5
    assert lost(x, iterated.S[:, None]) <= 0.002
    # The rest of the directions would cost more than to solve for all.
    most = next(k for k in range(160) if oversampled(k) > 80)
    whole = truncated_svd(x, RankRule(rank=most), svd="subspace")
    reference = truncated_svd(x, RankRule(rank=most), svd="exact")
    assert relative_error(whole.dense(), reference.dense().double()) <= 1e-3
    stack = truncated_svd(torch.stack([x, x * 2]), RankRule(rank=20), svd="subspace")
    # A GPU's products of stacks are other kernels.
    at_most = 0.0 if DEVICE.type == "cpu" else 1e-5
    assert relative_error(stack.dense()[0], iterated.dense().double()) <= at_most


def test_cart_auto_takes_it_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cart_plugin.linalg.svd._FAST_SIDE", 64)
    tensors = [with_spectrum(power_law(96, 0.6), 96, 128, seed=seed) for seed in range(4)]
    centre = sum(tensors) / 4
    for svd, solver in (("auto", "subspace"), ("exact", "exact")):
        settings = CartSettings(lambda_="auto", svd=svd)
        assert settings.solver == solver
        parts = [truncated_svd(tensor - centre, settings.rule, svd=solver) for tensor in tensors]
        expected = centre + least_interference((part, 1.0) for part in parts)
        torch.testing.assert_close(merge_tensors(tensors, settings), expected, atol=1e-5, rtol=1e-4)
        found = truncated(tensors[0] - centre, settings, None).S[0]
        atol = 0.0 if DEVICE.type == "cpu" else 1e-5  # of stacks, as above
        torch.testing.assert_close(found, parts[0].S, rtol=0.0, atol=atol)
    assert CartSettings().solver == "auto"


def test_with_a_base_cart_auto_takes_the_sketch_unless_told_otherwise() -> None:
    settings = CartSettings(lambda_="auto")
    assert settings.informed.solver == "sketch"
    assert CartSettings(lambda_="auto", svd="fast").informed.solver == "fast"
    assert CartSettings(lambda_="auto", rank=3).informed.solver == "sketch"
