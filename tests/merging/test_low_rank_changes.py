"""CART without hyperparameters of changes that LoRA has made: its equations, and what must hold."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import scipy.linalg
import torch
from torch import Tensor

from cart_plugin import CartSettings, merge_tensors
from cart_plugin.merging.low_rank_changes import is_low_rank
from tests.support import random

AUTO = CartSettings(lambda_="auto")


def adapters(count: int, *, one_start: bool, rank: int = 3, shared: float = 0.0) -> list[Tensor]:
    """Changes ``B A`` of a weight (40, 60); with one start all have all but the same A."""
    common = random(40, rank, seed=50)
    found = []
    for task in range(count):
        start = random(rank, 60, seed=100 if one_start else 100 + task)
        rows = start + 0.02 * random(rank, 60, seed=200 + task)
        found.append((random(40, rank, seed=300 + task) + shared * common) @ rows)
    return found


def merged(taus: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    base = torch.zeros(40, 60)
    return merge_tensors(list(taus), AUTO, base=base, weights=weights, name="w")


def by_definition(taus: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The method in fp64 as its module has it: what to add to the base."""
    taus = [tau.double() for tau in taus]
    count, n = len(taus), taus[0].shape[1]
    p = [weight / sum(weights) for weight in weights]
    m = sum(share * tau for share, tau in zip(p, taus, strict=True))
    pairs = [(s, t) for s in range(count) for t in range(count) if s != t]
    x = sum(p[s] * p[t] * taus[s].mT @ taus[t] for s, t in pairs) / sum(
        p[s] * p[t] for s, t in pairs
    )
    # G has the eigenvectors of the pencil (X, m^T m), in the space that m acts on.
    rows = torch.linalg.svd(m)[2][: int(torch.linalg.matrix_rank(m, rtol=1e-4))].mT
    square = rows.mT @ m.mT @ m @ rows
    values, vectors = scipy.linalg.eigh(rows.mT @ x @ rows, square)
    vectors = torch.from_numpy(vectors)
    shares = torch.from_numpy(values).clamp(0, 1)
    g = rows @ (vectors * shares) @ torch.linalg.inv(vectors) @ rows.mT
    gram, fitted = torch.zeros(n, n, dtype=torch.float64), torch.zeros_like(m)
    summed, energy, known = torch.zeros_like(m), 0.0, 0
    for share, tau in zip(p, taus, strict=True):
        w = count * share
        _, s, vh = torch.linalg.svd(tau - m @ g)
        own = vh[: int((s > 0.01 * s[0]).sum())]
        known += len(own)
        c = own.mT @ torch.diag(s[: len(own)] ** 2) @ own + m.mT @ m / sum(one**2 for one in p)
        c /= c.trace()
        d = tau - m
        acting = d @ own.mT @ own
        gram, fitted = gram + w * c, fitted + w * d @ c
        summed, energy = summed + w * acting, energy + w * float(acting.square().sum())
    r = 0.3 * gram.trace() / min(n, known)
    right = fitted + r * summed / max(float(summed.square().sum()) / energy, 0.3)
    eye = torch.eye(n, dtype=torch.float64)
    return m + torch.linalg.solve(gram + r * eye, right, left=False)


@pytest.mark.parametrize("one_start", [True, False])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 2.0, 0.5], [1.0] * 4])
def test_it_solves_the_equations(weights: list[float], one_start: bool) -> None:
    taus = adapters(len(weights), one_start=one_start, shared=0.7)
    found, expected = merged(taus, weights), by_definition(taus, weights)
    assert torch.linalg.norm(found - expected) < 1e-4 * torch.linalg.norm(expected)


def test_rounding_of_full_rank_beside_an_adapter_changes_little() -> None:
    taus = adapters(3, one_start=False)
    noise = [1e-3 * random(40, 60, seed=seed) for seed in range(3)]
    found = merged([tau + one for tau, one in zip(taus, noise, strict=True)])
    clean = merged(taus)
    assert torch.linalg.norm(found - clean) < 1e-2 * torch.linalg.norm(clean)


def test_stacks_are_merged_matrix_by_matrix() -> None:
    sets = [adapters(3, one_start=True), adapters(3, one_start=False, shared=1.0)]
    stacked = [torch.stack(pair) for pair in zip(*sets, strict=True)]
    zero = torch.zeros(2, 40, 60)
    found = merge_tensors(stacked, AUTO, base=zero, name="mlp.experts.up_proj")
    for index, taus in enumerate(sets):
        assert torch.allclose(found[index], merged(taus), atol=1e-4)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_equal_ones_give_themselves_and_nothing_gives_nothing(count: int) -> None:
    tau = adapters(1, one_start=True)[0]
    assert torch.allclose(merged([tau] * count), tau, atol=1e-4)
    assert merged([torch.zeros(40, 60)] * count).abs().max() == 0


def test_one_that_changed_nothing_leaves_another_whole() -> None:
    tau = adapters(1, one_start=True)[0]
    found = merged([tau, torch.zeros(40, 60)])
    assert torch.linalg.norm(found - tau) < 0.02 * torch.linalg.norm(tau)


def test_order_and_scale_do_not_matter() -> None:
    taus = adapters(3, one_start=True, shared=0.5)
    found = merged(taus)
    assert torch.allclose(merged(taus[::-1]), found, atol=1e-4)
    for scale in (2.0**-60, 2.0**40):
        assert torch.allclose(merged([scale * tau for tau in taus]) / scale, found, atol=1e-4)


@pytest.mark.parametrize("one_start", [True, False])
def test_a_weak_adapter_is_not_drowned(one_start: bool) -> None:
    """On its own inputs it answers for more beside a strong one than in their sum or average."""
    strong, weak = adapters(2, one_start=one_start)
    strong = 5 * strong
    rows = torch.linalg.qr(weak.mT)[0][:, :3]

    def off(change: Tensor) -> float:
        return float(torch.linalg.norm((change - weak) @ rows))

    assert off(merged([strong, weak])) < min(off(strong + weak), off((strong + weak) / 2)) * 1.05


def test_what_is_of_low_rank() -> None:
    values = torch.tensor([3.0, 1.0, 0.08, 0.02])
    energy, none = values.double().square().sum(), torch.zeros((), dtype=torch.float64)
    assert is_low_rank(values, energy, none, 2)  # 10 of 10.0068
    assert not is_low_rank(values, energy, none, 1)
    assert not is_low_rank(values[:2], torch.tensor(10.1, dtype=torch.float64), none, 2)
    assert is_low_rank(values[:2], torch.tensor(10.1, dtype=torch.float64), none + 0.1, 2)
    assert is_low_rank(torch.zeros(4), none, none, 2)


@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float32])
def test_adapters_merged_into_bf16_weights_are_of_low_rank(loaded: torch.dtype) -> None:
    """Rounding, here 1 % of their squares, is of full rank."""
    base = (2 * random(40, 60, seed=9)).bfloat16().float()
    taus = [0.03 * tau for tau in adapters(3, one_start=True, shared=0.5)]
    models = [(base + tau).bfloat16() for tau in taus]
    noise = [
        torch.linalg.norm(one - base - tau) / torch.linalg.norm(tau)
        for one, tau in zip(models, taus, strict=True)
    ]
    assert all(0.05 < float(one) < 0.2 for one in noise)
    found = merge_tensors([one.to(loaded) for one in models], AUTO, base=base, name="w").float()
    found -= base
    expected = merged(taus)
    assert torch.linalg.norm(found - expected) < 0.25 * torch.linalg.norm(expected)
    whole = merged([tau + 1e-1 * random(40, 60, seed=7) for tau in taus])  # of full rank
    assert torch.linalg.norm(whole - expected) > 0.4 * torch.linalg.norm(expected)
