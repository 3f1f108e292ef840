"""CART without hyperparameters, with a base model: its equations, and what must hold of merges."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cart_plugin import CartError, CartSettings, merge_state_dicts, merge_tensors
from cart_plugin.linalg.gram import total_energy
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import truncated_svd
from cart_plugin.merging.informed import Change, few_directions, informed_by_base
from tests.support import random

AUTO = CartSettings(lambda_="auto")


def matrices(count: int, m: int, n: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m, n, generator=generator) for _ in range(count)]


def on_own_inputs(count: int, m: int, n: int, seed: int = 0) -> list[Tensor]:
    """Task vectors whose row spaces are orthogonal, and together the whole space."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.linalg.qr(torch.randn(n, n, generator=generator))[0].mT
    rank = n // count
    falling = 0.9 ** torch.arange(rank)
    return [
        (left * falling) @ inputs[rank * task : rank * (task + 1)]
        for task, left in enumerate(matrices(count, m, rank, seed))
    ]


def change(tau: Tensor, rank: int, weight: float) -> Change:
    """Of full rank."""
    factors, leading = (
        truncated_svd(tau, RankRule(rank=kept)) for kept in (rank, few_directions(*tau.shape[1:]))
    )
    energy = total_energy(tau)
    return Change(factors, leading.S, weight, energy, torch.zeros_like(energy))


def leading_inputs(tau: Tensor) -> Tensor:
    """Those that are kept."""
    return torch.linalg.svd(tau)[2][: int(0.24 * min(tau.shape))].mT


def merged(
    changes: Sequence[Tensor], base: Tensor, weights: list[float] | None = None, svd: str = "auto"
) -> Tensor:
    settings = CartSettings(lambda_="auto", svd=svd)
    tensors = [base + one for one in changes]
    return merge_tensors(tensors, settings, base=base, name="w", weights=weights) - base


def by_definition(taus: Sequence[Tensor], weights: Sequence[float], rank: int) -> Tensor:
    """The method in fp64 as its module has it: what to add to the average."""
    taus = [tau.double() for tau in taus]
    n, scale = taus[0].shape[-1], len(taus) / sum(weights)
    weights = [scale * weight for weight in weights]
    mean = sum(w * tau for w, tau in zip(weights, taus, strict=True)) / len(taus)
    fitted, summed = torch.zeros_like(mean), torch.zeros_like(mean)
    gram, energy, directions = torch.zeros(n, n, dtype=torch.float64), 0.0, 0
    for w, tau in zip(weights, taus, strict=True):
        _, s, vh = torch.linalg.svd(tau, full_matrices=False)
        s, vh = s[:rank], vh[:rank]
        s, vh = s[s > 0.01 * s[0]], vh[s > 0.01 * s[0]]
        directions += len(s)
        c = (vh.mT * s**2) @ vh / s.square().sum()
        d = (tau - mean) @ vh.mT @ vh
        fitted, gram = fitted + w * d @ c, gram + w * c
        summed, energy = summed + w * d, energy + w * float(d.square().sum())
    r = 0.3 * gram.trace() / min(n, directions)
    right = fitted + r * summed / max(float(summed.square().sum()) / energy, 0.3)
    return torch.linalg.solve(gram + r * torch.eye(n, dtype=torch.float64), right, left=False)


# The ranks sum to less than n (a system of that size), and to more (n unknowns).
@pytest.mark.parametrize(("m", "n", "rank"), [(24, 64, 5), (64, 24, 5), (24, 24, 24), (8, 96, 8)])
@pytest.mark.parametrize("count", [2, 5])
def test_it_solves_the_normal_equations(m: int, n: int, rank: int, count: int) -> None:
    shared, *taus = matrices(count + 1, m, n)
    taus = [tau + shared for tau in taus]
    weights = [1.0, 0.5, 2.0, 0.5, 1.5][:count]
    mean = sum(w * tau for w, tau in zip(weights, taus, strict=True)) / sum(weights)
    changes = [change(tau[None], rank, w) for w, tau in zip(weights, taus, strict=True)]
    found = informed_by_base(iter(changes), mean[None]).added[0]
    expected = by_definition(taus, weights, rank)
    assert torch.linalg.norm(found - expected) < 1e-4 * torch.linalg.norm(expected)


def test_a_merge_is_the_average_and_that() -> None:
    base, *taus = matrices(4, 24, 40)
    weights = [1.0, 2.0, 1.0]
    mean = (taus[0] + 2 * taus[1] + taus[2]) / 4
    expected = mean + by_definition(taus, weights, int(0.24 * 24))
    found = merged(taus, base, weights=weights)
    assert torch.linalg.norm(found - expected) < 1e-4 * torch.linalg.norm(expected)


def test_stacks_are_merged_matrix_by_matrix() -> None:
    base, *taus = [torch.stack(matrices(3, 10, 16, seed)) for seed in range(4)]
    found = merge_tensors([base + tau for tau in taus], AUTO, base=base, name="mlp.experts.up_proj")
    for index in range(3):
        alone = merged([tau[index] for tau in taus], base[index])
        assert torch.allclose(found[index] - base[index], alone, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 3), seed=st.integers(0, 10**6))
def test_orthogonal_tasks_get_their_own_difference_back(count: int, seed: int) -> None:
    base = random(60, 80, seed=seed)
    taus = on_own_inputs(count, 60, 80, seed)
    found = merged(taus, base)
    for tau in taus:
        inputs = leading_inputs(tau)
        assert torch.linalg.norm((found - tau) @ inputs) < 0.05 * torch.linalg.norm(tau @ inputs)


@pytest.mark.parametrize("scale", [1, 1e-4])
def test_directions_that_are_rounding_do_not_count(scale: float) -> None:
    """Two adapters of rank 3, beside a model that was trained whole."""
    shared, *lefts = matrices(4, 60, 3)
    base, noise = random(60, 80, seed=1), 1e-2 * random(60, 80, seed=2)
    rows = matrices(4, 3, 80, seed=3)
    taus = [
        scale * (left @ row + shared @ rows[0]) for left, row in zip(lefts, rows[1:], strict=True)
    ]
    taus[0] = scale * random(60, 80, seed=4)
    mean = sum(taus) / 3
    clean = merged(taus, torch.zeros(60, 80), svd="exact")
    expected = mean + by_definition(taus, [1.0] * 3, 14)
    assert torch.linalg.norm(clean - expected) < 1e-3 * torch.linalg.norm(expected)
    if scale == 1:
        found = merged([tau + noise for tau in taus], base, svd="exact")
        assert torch.linalg.norm(found - clean) < 3e-2 * torch.linalg.norm(clean)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_equal_models_give_themselves(count: int) -> None:
    base, tau = matrices(2, 24, 40)
    assert torch.allclose(merged([tau] * count, base), tau, atol=1e-5)


@pytest.mark.parametrize(("count", "unchanged"), [(2, 1), (3, 1), (2, 2)])
def test_a_model_equal_to_the_base_changes_nothing_on_the_others_inputs(
    count: int, unchanged: int
) -> None:
    base = random(60, 80, seed=1)
    taus = on_own_inputs(count, 60, 80)
    found = merged([*taus, *[torch.zeros(60, 80)] * unchanged], base)
    for tau in taus:
        inputs = leading_inputs(tau)
        assert torch.linalg.norm((found - tau) @ inputs) < 0.05 * torch.linalg.norm(tau @ inputs)
    assert merged([torch.zeros(60, 80)] * 3, base).abs().max() < 1e-5


def test_task_vectors_that_cancel_are_not_blown_up() -> None:
    base, tau, other = matrices(3, 24, 40)
    opposite = merged([tau, -tau + 1e-3 * other], base)
    assert torch.linalg.norm(opposite) < 1.5 * torch.linalg.norm(tau)


def test_of_four_models_the_mean_with_the_form_without_the_base_is_taken() -> None:
    base, *taus = matrices(5, 24, 40)
    weights = [1.0, 2.0, 0.5, 1.0]
    mean = sum(w * tau for w, tau in zip(weights, taus, strict=True)) / sum(weights)
    informed = mean + by_definition(taus, weights, int(0.24 * 24))
    centred = merge_tensors(taus, AUTO, weights=weights, name="w")
    expected = (informed + centred) / 2
    found = merged(taus, base, weights=weights)
    assert torch.linalg.norm(found - expected) < 1e-4 * torch.linalg.norm(expected)


def test_more_models_than_the_base_is_measured_for_are_merged_without_it() -> None:
    base, *tensors = matrices(6, 16, 24)
    found = merge_tensors(tensors, AUTO, base=base, name="w")
    assert torch.equal(found, merge_tensors(tensors, AUTO, name="w"))
    # A model without a weight does not count.
    weights = [1.0, 1.0, 1.0, 1.0, 0.0]
    four = merge_tensors(tensors, AUTO, base=base, weights=weights, name="w")
    assert torch.allclose(four, merge_tensors(tensors[:4], AUTO, base=base, name="w"), atol=1e-4)


def test_order_scale_and_weights() -> None:
    base, *taus = matrices(4, 24, 40)
    found = merged(taus, base)
    assert torch.allclose(merged(taus[::-1], base), found, atol=1e-5)
    nothing = torch.zeros(24, 40)
    for scale in (2.0**-100, 2.0**-40, 2.0**60, 2.0**100):
        scaled = merged([scale * tau for tau in taus], nothing)
        assert torch.allclose(scaled / scale, found, atol=1e-4)
    heavier = merged(taus, base, weights=[2.0, 1.0, 1.0])
    assert torch.linalg.norm(heavier - taus[0]) < torch.linalg.norm(found - taus[0])
    absent = merged([*taus, *taus[:2]], base, weights=[0.3, 0.3, 0.3, 0.0, 0.0])
    assert torch.allclose(absent, found, atol=1e-4)


def test_two_models_are_more_than_their_average_and_without_a_word() -> None:
    base = random(60, 80, seed=1)
    taus = on_own_inputs(2, 60, 80)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = merged(taus, base)
    for tau in taus:
        inputs = leading_inputs(tau)
        assert torch.linalg.norm((found - tau) @ inputs) < 0.05 * torch.linalg.norm(tau @ inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_worked_in_fp32(dtype: torch.dtype) -> None:
    base, *tensors = [tensor.to(dtype) for tensor in matrices(4, 16, 24)]
    exact = merge_tensors([tensor.float() for tensor in tensors], AUTO, base=base.float(), name="w")
    found = merge_tensors(tensors, AUTO, base=base, name="w")
    assert torch.equal(found, exact.to(dtype))


def test_what_is_not_decomposed_is_averaged() -> None:
    base, *tensors = [random(12, seed=seed) for seed in range(4)]
    mean = sum(tensors) / 3
    assert torch.allclose(merge_tensors(tensors, AUTO, base=base, name="norm.weight"), mean)


def test_center_average_leaves_the_base_out() -> None:
    base, *tensors = matrices(4, 16, 24)
    average = CartSettings(lambda_="auto", center="average")
    with_base = merge_tensors(tensors, average, base=base, name="w")
    assert torch.equal(with_base, merge_tensors(tensors, AUTO, name="w"))
    assert not torch.allclose(with_base, merge_tensors(tensors, AUTO, base=base, name="w"))


def test_state_dicts_take_a_base() -> None:
    base, *models = [{"w": tensor, "norm": tensor[0]} for tensor in matrices(4, 16, 24)]
    found = merge_state_dicts(models, AUTO, base=base)
    tensors = [model["w"] for model in models]
    assert torch.equal(found["w"], merge_tensors(tensors, AUTO, base=base["w"], name="w"))
    again = merge_state_dicts(models, AUTO, base={"w": base["w"]})  # the rest is averaged
    assert all(torch.equal(again[name], found[name]) for name in found)
    with pytest.raises(CartError, match="the base model lacks w, which is decomposed"):
        merge_state_dicts(models, AUTO, base={"norm": base["norm"]})


@pytest.mark.parametrize(
    ("count", "settings", "said"),
    [
        (2, AUTO, ["the base model shows where the inputs of the 2 models' tasks lie"]),
        (5, AUTO, ["the base model only tells whether adapters have made the 5 models"]),
        (3, CartSettings(lambda_="auto", center="average"), []),
        (3, CartSettings(lambda_="auto", center="base"), []),
        (3, CartSettings(), []),
    ],
)
def test_a_merge_says_once_what_the_base_is_for(
    count: int, settings: CartSettings, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    base, *models = [
        {"a.weight": tensor, "b.weight": tensor.mT, "norm": tensor[0]}
        for tensor in matrices(1 + count, 16, 24)
    ]
    with caplog.at_level("INFO", logger="cart_plugin"):
        merge_state_dicts(models, settings, base=base)
    assert len(caplog.messages) == len(said)
    assert all(found.startswith(text) for found, text in zip(caplog.messages, said, strict=True))


def test_bad_bases_and_weights_are_refused() -> None:
    base, *tensors = matrices(4, 16, 24)
    with pytest.raises(CartError, match=r"in 0 but .* in the base model"):
        merge_tensors(tensors, AUTO, base=base[:8], name="w")
    with pytest.raises(CartError, match="the base model holds 1 NaN"):
        merge_tensors(tensors, AUTO, base=torch.where(base == base[0, 0], torch.nan, base))
    broken = torch.where(tensors[1] == tensors[1][0, 0], torch.nan, tensors[1])
    with pytest.raises(CartError, match="1 holds 1 NaN"):
        merge_tensors([tensors[0], broken], AUTO, base=base)
    with pytest.raises(CartError, match=r"cart_auto .* takes no negative weights"):
        merge_tensors(tensors, AUTO, base=base, weights=[2.0, 1.0, -0.5])
