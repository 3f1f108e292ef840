"""Peers: each against its formula in plain fp64 loops, and by what it is known to do."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.common import peers

M, N, T = 9, 7, 3
METHODS = {
    "aswudi": peers.aswudi,
    "swudi": peers.swudi,
    "ace": peers.ace,
    "dc_merge": partial(peers.dc_merge, density=0.3),
    "svc": lambda taus: peers.svc(sum(taus), taus),
}
WITHOUT_EPS = [name for name in METHODS if name != "ace"]


def drawn(count=T, m=M, n=N, seed=0, scales=None):
    """Random task vectors; `scales` makes them of different norms."""
    generator = torch.Generator().manual_seed(seed)
    scales = scales or [1.0] * count
    return [scale * torch.randn(m, n, generator=generator) for scale in scales]


def orthogonal(seed=0):
    """Two task vectors of rank 2 whose row spaces, and column spaces, are orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(M, 4, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(N, 4, generator=generator))
    values = torch.diag(torch.tensor([3.0, 2.0]))
    return [left[:, part] @ values @ right[:, part].T for part in (slice(0, 2), slice(2, 4))]


def doubles(taus):
    return [tau.double().numpy() for tau in taus]


def naive_wudi(taus, filters):
    c, d, theta = np.zeros((N, N)), np.zeros((M, N)), np.zeros((M, N))
    for tau in taus:
        norm = (tau**2).sum()
        c += tau.T @ tau / norm
        d += tau @ tau.T @ tau / norm
        theta += tau
    values, vectors = np.linalg.eigh(c)
    order = np.argsort(-values)
    merged = theta.copy()
    for h, k in zip(filters(values[order]), order, strict=True):
        column = vectors[:, k : k + 1]
        merged += h / values[k] * (d - theta @ c) @ column @ column.T
    return merged


def test_aswudi_is_its_formula():
    def hard(values):
        kept = math.ceil(np.sqrt(values).sum() ** 2 / values.sum())
        assert 1 < kept < N
        return [1.0] * kept + [0.0] * (N - kept)

    taus = [tau * torch.linspace(1, 0.05, N) for tau in drawn()]
    assert peers.aswudi(taus).numpy() == pytest.approx(naive_wudi(doubles(taus), hard), abs=1e-4)


def test_swudi_is_its_formula():
    def soft(values):
        return [1 - math.exp(-4 * value) if k < 5 else 0.0 for k, value in enumerate(values)]

    found = peers.swudi(drawn(), time=4, rank_ratio=5 / N)
    assert found.numpy() == pytest.approx(naive_wudi(doubles(drawn()), soft), abs=1e-4)


def test_swudi_with_everything_kept_minimises_wudis_loss():
    taus = drawn()
    merged = peers.swudi(taus, time=1e9, rank_ratio=1.0).requires_grad_()
    loss = sum((((merged - tau) @ tau.T) ** 2).sum() / (tau**2).sum() for tau in taus)
    loss.backward()
    assert merged.grad.abs().max() < 1e-4


def naive_ace(taus, eps, threshold, share):
    one = np.ones((len(taus[0]), 1))
    centred = [tau - one @ tau.mean(axis=0, keepdims=True) for tau in taus]
    sigma = [row.T @ row for row in centred]
    energy = np.array([(tau**2).sum() for tau in taus])
    gamma = np.log(energy).var() / np.log(energy).mean() ** 2
    traces = [np.trace(own) for own in sigma]
    if gamma > threshold:
        sigma = [own / trace for own, trace in zip(sigma, traces, strict=True)]
        regular = [own + eps / trace * np.eye(N) for own, trace in zip(sigma, traces, strict=True)]
    else:
        regular = [own + eps * np.eye(N) for own in sigma]
    prior = np.ones((N, 1)) @ np.ones((1, N)) @ sum(sigma) / N
    if gamma > threshold:
        prior /= energy.mean()
    merged = sum(row @ own for row, own in zip(centred, regular, strict=True))
    merged = merged @ np.linalg.inv(sum(regular) + prior)
    if gamma <= threshold:
        return merged, gamma
    mean = sum(regular) / len(taus)
    fused = merged + sum(tau @ (own - mean) for tau, own in zip(taus, sigma, strict=True))
    u, s, vh = np.linalg.svd(fused)
    k = int(share * min(fused.shape))
    return merged + s[:k].mean() * u[:, :k] @ vh[:k], gamma


@pytest.mark.parametrize(("scales", "uneven"), [([1, 1.1, 0.9], False), ([0.1, 1, 3], True)])
def test_ace_is_its_formula_on_even_and_on_uneven_tasks(scales, uneven):
    taus = drawn(scales=scales)
    expected, gamma = naive_ace(doubles(taus), 1e-2, 0.3, 0.3)
    assert (gamma > 0.3) == uneven
    assert peers.ace(taus, eps=1e-2).numpy() == pytest.approx(expected, abs=1e-4)


def naive_dc_merge(taus, k, density):
    count, (m, n) = len(taus), taus[0].shape
    left, right, cut = np.zeros((m, count * k)), np.zeros((n, count * k)), []
    for t, tau in enumerate(taus):
        u, s, vh = np.linalg.svd(tau, full_matrices=False)
        left[:, t * k : (t + 1) * k], right[:, t * k : (t + 1) * k] = u[:, :k], vh[:k].T
        cut.append(u[:, :k] @ np.diag(s[:k]) @ vh[:k])
    for basis in (left, right):
        values, vectors = np.linalg.eigh(basis.T @ basis)
        basis[:] = basis @ vectors @ np.diag(values**-0.5) @ vectors.T
    cores = [left.T @ tau @ right for tau in cut]
    kept = int(density * cores[0].size)
    for core in cores:
        core[np.abs(core) < np.sort(np.abs(core), axis=None)[-kept]] = 0
    merged = np.zeros_like(cores[0])
    for i in range(count * k):
        for j in range(count * k):
            entries = [core[i, j] for core in cores]
            agreeing = [entry for entry in entries if entry * sum(entries) > 0]
            if agreeing and i // k == j // k:
                merged[i, j] = sum(agreeing) / len(agreeing)
    return left @ merged @ right.T


@pytest.mark.parametrize(("rank", "density"), [(None, 0.3), (1, 0.7)])
def test_dc_merge_is_its_formula(rank, density):
    expected = naive_dc_merge(doubles(drawn()), rank or 2, density)
    found = peers.dc_merge(drawn(), rank=rank, density=density)
    assert found.numpy() == pytest.approx(expected, abs=1e-4)


def test_smoothing_keeps_the_sum_of_the_singular_values_and_limits_their_ratio():
    (tau,) = drawn(1)
    before = torch.linalg.svdvals(tau)[:4]
    for most in (1.0, 1.5, 1e9):
        merged = peers.dc_merge([tau], rank=4, density=1.0, smoothing=most)
        values = torch.linalg.svdvals(merged)
        assert values[4:].abs().max() < 1e-5
        assert values[:4].sum().item() == pytest.approx(before.sum().item(), rel=1e-5)
        ratio = min(most, (before[0] / before[3]).item())
        assert (values[0] / values[3]).item() == pytest.approx(ratio, rel=1e-4)
        steps = values[:4].diff()
        assert torch.allclose(steps, steps.mean(), atol=1e-5)


@pytest.mark.parametrize("a", [None, 0.05, 1.0])
def test_svc_is_its_formula(a):
    taus = drawn(scales=[0.2, 1, 2])
    whole = doubles([sum(taus)])[0]
    u, s, vh = np.linalg.svd(whole, full_matrices=False)
    expected = np.zeros_like(whole)
    for r in range(N):
        shares = []
        for tau in doubles(taus):
            own = u[:, r] @ tau
            shares.append(max(u[:, r] @ whole @ own / (own @ own), 1 / T if a is None else a))
        expected += s[r] / np.mean(shares) * np.outer(u[:, r], vh[r])
    assert peers.svc(sum(taus), taus, a).numpy() == pytest.approx(expected, abs=1e-4)


def test_svc_gives_what_fusion_bench_gives():
    utils = pytest.importorskip("fusion_bench.method.singular_value_calibration.utils")
    taus = drawn()
    zero = torch.zeros(M, N)
    theirs = utils.subspace_consistency_spectral_calibration_accelerated(
        zero, taus, sum(taus), alpha=0.4
    )
    assert torch.allclose(peers.svc(sum(taus), taus, 0.4), theirs, atol=1e-5)


def test_svc_of_equal_tasks_is_the_task_whatever_their_sums_scale():
    (tau,) = drawn(1)
    for scale in (0.5, 1.0, 4.0):
        assert torch.allclose(peers.svc(scale * tau, [tau] * 3), tau, atol=1e-5)


@pytest.mark.parametrize("merge", [peers.aswudi, peers.swudi, partial(peers.dc_merge, density=1.0)])
def test_one_task_is_itself(merge):
    (tau,) = drawn(1)
    assert torch.allclose(merge([tau]), tau, atol=1e-5)


def test_one_task_of_ace_is_itself_without_its_mean_row_but_for_the_shared_prior():
    (tau,) = drawn(1)
    expected, _ = naive_ace(doubles([tau]), 1e-5, 0.3, 0.3)
    assert peers.ace([tau]).numpy() == pytest.approx(expected, abs=1e-4)
    centred = tau - tau.mean(dim=0)
    assert (peers.ace([tau]) - centred).norm() < 0.5 * centred.norm()


# DC-Merge: as many entries as a core has singular values, as entries of rounding have signs, too.
@pytest.mark.parametrize(
    "merge",
    [peers.aswudi, peers.swudi, partial(peers.dc_merge, rank=2, density=2 / 16), METHODS["svc"]],
)
def test_orthogonal_tasks_are_added(merge):
    taus = orthogonal()
    assert torch.allclose(merge(taus), sum(taus), atol=1e-4)


@pytest.mark.parametrize("merge", METHODS.values(), ids=METHODS)
def test_the_order_of_the_tasks_does_not_matter(merge):
    taus = drawn(scales=[0.3, 1, 2])
    assert torch.allclose(merge(taus), merge(taus[::-1]), atol=1e-4)


@pytest.mark.parametrize("name", WITHOUT_EPS)
def test_scaled_tasks_give_a_scaled_result(name):
    taus = drawn()
    scaled = METHODS[name]([1e-3 * tau for tau in taus])
    assert torch.allclose(1e3 * scaled, METHODS[name](taus), atol=1e-4)


@pytest.mark.parametrize("merge", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(("m", "n"), [(M, N), (N, M)])
def test_an_untrained_task_changes_nothing_and_untrained_tasks_give_zero(merge, m, n):
    taus, zero = drawn(2, m, n, scales=[1, 2]), torch.zeros(m, n)
    assert torch.equal(merge([zero, zero]), zero)
    found = merge([*taus, zero])
    assert found.isfinite().all()
    if merge is not METHODS["svc"]:  # its 1 / T counts every task
        assert torch.allclose(found, merge(taus), atol=1e-5)


@pytest.mark.parametrize("merge", METHODS.values(), ids=METHODS)
def test_half_precision_is_merged_in_single(merge):
    taus = [tau.bfloat16() for tau in drawn()]
    assert merge(taus).dtype == torch.float32
    assert torch.allclose(merge(taus), merge([tau.float() for tau in taus]), atol=2e-2)


@pytest.mark.parametrize("merge", METHODS.values(), ids=METHODS)
def test_low_rank_tasks_of_a_wide_matrix_are_merged(merge):
    generator = torch.Generator().manual_seed(0)
    taus = [
        torch.randn(12, 2, generator=generator) @ torch.randn(2, 40, generator=generator) / 10
        for _ in range(2)
    ]
    merged = merge(taus)
    assert merged.isfinite().all()
    assert 0.1 * sum(taus).norm() < merged.norm() < 3 * sum(taus).norm()
