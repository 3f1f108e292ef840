"""CART without hyperparameters of changes that LoRA has made: its equations, and what must hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest
import scipy.linalg
import torch
from torch import Tensor

from cart_plugin import CartSettings, merge_tensors
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import truncated_svd
from cart_plugin.merging.least_interference import least_interference
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


def in_all_ways(taus: Sequence[Tensor], weights: Sequence[float] | None = None) -> list[Tensor]:
    """Merges of models that changed by these: with their base, without it, with it left out."""
    base = random(40, 60, seed=9)
    models = [base + tau for tau in taus]
    left_out = CartSettings(lambda_="auto", center="average")
    return [
        merge_tensors(models, AUTO, base=base, weights=weights, name="w") - base,
        merge_tensors(models, AUTO, weights=weights, name="w") - base,
        merge_tensors(models, left_out, base=base, weights=weights, name="w") - base,
    ]


@pytest.mark.parametrize("weights", [[1.0] * 5, [1.0] * 9, [3.0, *[1.0] * 5, 0.0]])
def test_many_take_their_average_for_the_base(weights: list[float]) -> None:
    taus = [tau.double() for tau in adapters(len(weights), one_start=False, rank=2)]
    p = [weight / sum(weights) for weight in weights]
    m = sum(share * tau for share, tau in zip(p, taus, strict=True))
    own = [tau - m for tau in taus]
    tasks = 1 / sum(one**2 for one in p)
    others = sum(share * d.mT @ d for share, d in zip(p, own, strict=True)) * max(1.0, tasks / 4)
    gram, fitted, known = torch.zeros_like(others), torch.zeros_like(m), 0
    for share, d in zip(p, own, strict=True):
        _, s, _ = torch.linalg.svd(d)
        known += int((s > 0.01 * s[0]).sum()) if share else 0
        c = (d.mT @ d + others) / (d.mT @ d + others).trace()
        gram, fitted = gram + len(p) * share * c, fitted + len(p) * share * d @ c
    r = 0.3 * gram.trace() / min(60, known)
    expected = m + torch.linalg.solve(gram + r * torch.eye(60), fitted, left=False)
    for found in in_all_ways([tau.float() for tau in taus], weights):
        assert torch.linalg.norm(found - expected) < 1e-4 * torch.linalg.norm(expected)


@pytest.mark.parametrize("count", [5, 8])
def test_many_do_not_drown_in_what_each_has_drawn(count: int) -> None:
    """A is a draw: each task's inputs meet all rows alike, and no sum of all is scaled up."""
    taus = adapters(count, one_start=False, rank=3)
    mean = sum(taus) / count

    def off(change: Tensor) -> float:
        return sum(float((change - tau).square().sum()) for tau in taus)

    for found in in_all_ways(taus):
        assert off(found) < 2 * off(mean)


@pytest.mark.parametrize("options", [{"rank": 1}, {"rank_ratio": 0.03}])
def test_a_rank_rule_keeps_none_of_many_in_the_dark(options: dict[str, float]) -> None:
    """Without a base it is told by differences from one model: neither cut nor order decide."""
    base = random(40, 60, seed=9)
    models = [base + tau for tau in adapters(6, one_start=False)]
    ruled = CartSettings(lambda_="auto", **options)
    found = merge_tensors(models, ruled, name="w")
    assert torch.allclose(found, merge_tensors(models, AUTO, name="w"), atol=1e-5)
    assert torch.allclose(found, merge_tensors(models[::-1], ruled, name="w"), atol=1e-3)


def test_many_of_which_one_is_of_full_rank_are_merged_as_whole_models() -> None:
    base = random(40, 60, seed=9)
    models = [base + tau for tau in adapters(6, one_start=False)]
    models[-1] = models[-1] + 0.3 * random(40, 60, seed=8)
    parts = [
        (truncated_svd(one - sum(models) / 6, RankRule(0.16), svd="exact"), 1.0) for one in models
    ]
    expected = sum(models) / 6 + least_interference(parts)
    for options in ({}, {"base": base}):
        found = merge_tensors(
            models, CartSettings(lambda_="auto", svd="exact"), name="w", **options
        )
        assert torch.allclose(found, expected, atol=1e-4)


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


@pytest.mark.parametrize("count", [2, 3, 4, 6])
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
    values = torch.tensor([[3.0, 1.0, 0.08, 0.02]])
    energy, none = values.double().square().sum(dim=1), torch.zeros(1, dtype=torch.float64)
    shape = (40, 60)
    assert is_low_rank(values[:, :2], energy, none, shape)  # 10 of 10.0068
    assert is_low_rank(values[:, :1], energy, none, shape) is False
    assert is_low_rank(values[:, :2], none + 10.1, none, shape) is False
    assert is_low_rank(values[:, :2], none + 10.1, none + 0.12, shape)  # 0.11 of it elsewhere
    assert is_low_rank(values[:, :2], none + 10.1, none + 0.05, shape) is False


def test_what_cannot_be_told() -> None:
    values, none = torch.tensor([[3.0, 1.0]]), torch.zeros(1, dtype=torch.float64)
    assert is_low_rank(torch.zeros(1, 2), none, none, (40, 60)) is None
    assert is_low_rank(values, none + 20, none + 11, (40, 60)) is None
    # In a stack the others decide.
    values, energy = values.expand(2, 2), torch.tensor([20.0, 10.0], dtype=torch.float64)
    assert is_low_rank(values, energy, torch.tensor([11.0, 0.0]).double(), (40, 60))
    assert is_low_rank(values, energy + 1, torch.tensor([11.0, 0.0]).double(), (40, 60)) is False


def error_of(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))


def base_and_models(
    dtype: torch.dtype, taus: Sequence[Tensor], scale: float = 2.0
) -> tuple[Tensor, list[Tensor]]:
    """A base that bf16 holds, and models that were rounded to a dtype."""
    base = (scale * random(40, 60, seed=9)).bfloat16().float()
    return base, [(base + tau).to(dtype) for tau in taus]


@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float32])
def test_adapters_merged_into_bf16_weights_are_of_low_rank(loaded: torch.dtype) -> None:
    """Rounding, here 1 % of their squares, is of full rank."""
    taus = [0.03 * tau for tau in adapters(3, one_start=True, shared=0.5)]
    base, models = base_and_models(torch.bfloat16, taus)
    for one, tau in zip(models, taus, strict=True):
        assert 0.05 < error_of(one - base, tau) < 0.2
    found = merge_tensors([one.to(loaded) for one in models], AUTO, base=base, name="w").float()
    assert error_of(found - base, merged(taus)) < 0.25
    noise = [0.003 * random(40, 60, seed=60 + task) for task in range(3)]
    other = merged([tau + one for tau, one in zip(taus, noise, strict=True)])
    assert error_of(other, merged(taus)) > 0.4  # the form of full rank


def falling(count: int, base: float = 0.8) -> list[Tensor]:
    """What full fine-tuning changes: all directions, less and less."""
    values = base ** torch.arange(40)
    lefts = [torch.linalg.qr(random(40, 40, seed=task))[0] for task in range(count)]
    rights = [torch.linalg.qr(random(60, 40, seed=10 + task))[0] for task in range(count)]
    return [left * values @ right.mT for left, right in zip(lefts, rights, strict=True)]


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_was_trained_from_a_base_in_few_bits_has_no_rounding(
    dtype: torch.dtype, scale: float
) -> None:
    """Stored in fp32 it is what training made of that base, however large the base's spacing."""
    exact = 20 * random(40, 60, seed=9)
    stored = exact.to(dtype).float()
    taus = [scale * tau for tau in falling(3)]
    found, expected = (
        merge_tensors([base + tau for tau in taus], AUTO, base=base, name="w") - base
        for base in (stored, exact)
    )
    assert error_of(found, expected) < 1e-2


def test_full_fine_tuning_in_bf16_is_not_of_low_rank() -> None:
    """Its spectrum falls, and a quarter of the directions lacks 2 %, as much as rounding adds."""
    taus = falling(3)
    base, models = base_and_models(torch.bfloat16, taus, scale=3.3)
    for one, tau in zip(models, taus, strict=True):
        assert 0.01 < error_of(one - base, tau) ** 2 < 0.05
    found = merge_tensors(models, AUTO, base=base, name="w").float() - base
    cut = [truncated_svd(tau, RankRule(rank=9)).dense() for tau in taus]
    as_adapters = merged(cut) + sum(taus) / 3 - sum(cut) / 3
    assert error_of(found, merged(taus)) < 0.25 < error_of(as_adapters, merged(taus))


@pytest.mark.parametrize("options", [{"rank": 2}, {"rank_ratio": 0.05}, {"energy": 0.6}], ids=str)
def test_a_rank_rule_does_not_decide_what_made_a_change(options: dict[str, float]) -> None:
    taus = adapters(3, one_start=True, shared=0.5)
    settings = CartSettings(lambda_="auto", **options)
    found = merge_tensors(taus, settings, base=torch.zeros(40, 60), name="w")
    cut = [truncated_svd(tau, settings.informed.rule, svd="exact").dense() for tau in taus]
    # Not quite the same: what is cut off is lacking in the average, too.
    average = sum(taus) / 3 - sum(cut) / 3
    assert error_of(found, merged(cut) + average) < error_of(found, merged(taus)) < 1


def test_models_without_a_weight_do_not_count() -> None:
    taus = adapters(2, one_start=True, shared=0.5)
    found = merged([*taus, *adapters(2, one_start=False)], [1.0, 1.0, 0.0, 0.0])
    assert error_of(found, merged(taus)) < 1e-4


def test_a_barely_changed_model_does_not_decide_for_the_others() -> None:
    taus = [0.03 * tau for tau in adapters(3, one_start=True, shared=0.5)]
    taus[2] = 0.01 * taus[2]  # mostly rounded away
    base, models = base_and_models(torch.bfloat16, taus)
    found = merge_tensors(models, AUTO, base=base, name="w").float() - base
    assert error_of(found, merged(taus)) < 0.3


@pytest.mark.parametrize("count", [5, 6])
def test_many_adapters_in_bf16_are_told_without_a_base_too(count: int) -> None:
    """What sets two models apart has the rounding of both."""
    taus = [0.03 * tau for tau in adapters(count, one_start=False)]
    base, models = base_and_models(torch.bfloat16, taus)
    expected = merged(taus)
    for known in (base, None):
        found = merge_tensors(models, AUTO, base=known, name="w").float() - base
        assert error_of(found, expected) < 0.25
    exact = merge_tensors([base + tau for tau in taus], AUTO, name="w") - base
    assert error_of(exact, expected) < 1e-2


@pytest.mark.parametrize("center", [None, "average"])
@pytest.mark.parametrize("count", [3, 4])
def test_rounding_of_adapters_is_not_scaled_up_around_their_average(
    count: int, center: Literal["average"] | None
) -> None:
    """Without a base their sum cancels: rounding is what would be left to scale up."""
    base = (2 * random(160, 200, seed=9)).bfloat16().float()
    taus = [
        0.02 * random(160, 3, seed=2 * task) @ random(3, 200, seed=2 * task + 1)
        for task in range(count)
    ]
    models = [(base + tau).bfloat16().float() for tau in taus]
    settings = CartSettings(lambda_="auto", center=center)
    known = None if center is None else base
    found = merge_tensors(models, settings, base=known, name="w") - base
    clean = merge_tensors([base + tau for tau in taus], settings, base=known, name="w") - base
    rows = torch.linalg.svd(torch.cat(taus))[2][3 * count :]  # that no task has
    noise = float(torch.linalg.norm((sum(models) / count - base) @ rows.mT))
    assert noise > 0.03 * torch.linalg.norm(taus[0])
    assert torch.linalg.norm(clean @ rows.mT) < 1e-2 * noise
    assert torch.linalg.norm(found @ rows.mT) < 1.5 * noise
    assert error_of(found, clean) < 0.3


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("count", [3, 4, 6])
def test_a_weight_that_one_model_left_as_it_was_has_no_rounding(count: int, has_base: bool) -> None:
    """In fp32, of a base that bf16 holds: no order of models makes adapters of fine-tunes."""
    exact = 2 * random(40, 60, seed=9)
    stored = exact.bfloat16().float()
    taus = [0.02 * tau for tau in falling(count)]
    for place in (0, count - 1):
        taus[place] = torch.zeros(40, 60)
        found, expected = (
            merge_tensors(
                [base + tau for tau in taus], AUTO, base=base if has_base else None, name="w"
            )
            - base
            for base in (stored, exact)
        )
        assert error_of(found, expected) < 1e-2


def test_models_that_are_equal_in_bf16_were_not_trained() -> None:
    """The one that was is alone: what it changed cancels with what the others lack of it."""
    base = (2 * random(40, 60, seed=9)).bfloat16().float()
    trained = (base + falling(1)[0]).bfloat16().float()
    found = merge_tensors([trained, base, base], AUTO, name="w")
    average = (trained + 2 * base) / 3
    assert error_of(found - base, average - base) < 0.1
