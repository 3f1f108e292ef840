"""Differences of low rank: what is kept of them by default, and what is said where all of it is."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cart_plugin import CartSettings, merge_state_dicts, merge_tensors
from cart_plugin.errors import CartWarning
from cart_plugin.linalg.gram import total_energy
from cart_plugin.merging.indexing import index_tensors
from cart_plugin.merging.kept import Countdown, Kept
from tests.support import cart_formula, random, relative_error

SIDE = 512
EXPLICIT = CartSettings(rank_ratio=0.08)


def tuned(
    rank: int = 16,
    *,
    count: int = 4,
    side: int = SIDE,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    one_start: bool = True,
    scale: float = 3e-3,
) -> list[Tensor]:
    """Weights with adapters of a rank, whose ``A`` stay where all of them started, or do not."""
    base = 0.05 * random(side, side, seed=seed + 99)
    found = []
    for task in range(count):
        start = random(rank, side, seed=seed + 50 + (0 if one_start else task))
        found.append((base + scale * random(side, rank, seed=seed + task) @ start).to(dtype))
    return found


def average(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.double() for tensor in tensors]).mean(0)


def moved(merged: Tensor, tensors: list[Tensor]) -> float:
    """How far a merge is from the average, in units of the models' own distances."""
    mean = average(tensors)
    return float((merged.double() - mean).norm() / (tensors[0].double() - mean).norm())


@pytest.fixture(autouse=True)
def all_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CartWarning)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=5, deadline=None)
@given(count=st.integers(3, 6), rank=st.sampled_from([8, 16, 32]), seed=st.integers(0, 99))
def test_a_share_of_adapters_is_kept_by_default(
    dtype: torch.dtype, count: int, rank: int, seed: int
) -> None:
    tensors = [tensor.float() for tensor in tuned(rank, count=count, dtype=dtype, seed=seed)]
    merged = merge_tensors(tensors)
    # 99 % of the energy may be in a direction or two less than there are.
    close = [cart_formula(tensors, k) for k in {rank // 8, max(1, (rank - 2) // 8)}]
    assert min(relative_error(merged, expected) for expected in close) < 1e-4
    assert moved(merged, tensors) > 0.1
    assert moved(merge_tensors(tensors, EXPLICIT), tensors) < 0.03  # all that there is


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
def test_rounding_does_not_hide_the_rank_of_small_adapters(loaded: torch.dtype) -> None:
    """A tenth of what they differ by is rounding to bf16, and their 99 % more than 8 % hold."""
    exact = tuned(scale=1e-4)
    stored = [tensor.to(torch.bfloat16) for tensor in exact]
    noise = [one.float() - tensor for one, tensor in zip(stored, exact, strict=True)]
    mean = average(exact)
    for one, tensor in zip(noise, exact, strict=True):
        assert 0.04 < float(one.norm() / (tensor - mean).norm()) ** 2 < 0.2
    merged = merge_tensors([tensor.to(loaded) for tensor in stored], CartSettings()).float()
    close = [cart_formula(exact, k) for k in (1, 2)]
    assert min(relative_error(merged - mean, one - mean) for one in close) < 0.7
    assert moved(merged, exact) > 0.3
    kept = Kept()
    state_dicts = [{"w": tensor.to(loaded)} for tensor in stored]
    merge_state_dicts(state_dicts, CartSettings(rank=40), kept=kept)
    assert "kept at least 99%" in str(kept.warning())


def test_adapters_from_different_starts() -> None:
    tensors = tuned(side=1024, one_start=False)  # a centred rank of 64, below 0.08 * 1024
    merged = merge_tensors(tensors)
    assert min(relative_error(merged, cart_formula(tensors, k)) for k in (7, 8)) < 1e-4
    assert moved(merged, tensors) > 0.5


@pytest.mark.parametrize("center", [None, "average", "base"])
@pytest.mark.parametrize("shape", [(96, 128), (3, 80, 64), (600, 520)], ids=str)
def test_differences_of_full_rank_are_merged_to_the_same_bits(
    shape: tuple[int, ...], center: str | None
) -> None:
    tensors = [random(*shape, seed=seed) for seed in range(4)]
    base = random(*shape, seed=9)
    default, explicit = (
        merge_tensors(tensors, CartSettings(rank_ratio=ratio, center=center), base=base)  # type: ignore[arg-type]
        for ratio in (None, 0.08)
    )
    assert torch.equal(default, explicit)


def test_only_cart_without_a_rule_looks_at_the_rank() -> None:
    assert CartSettings().rule.of_numerical_rank
    for other in (
        EXPLICIT,
        CartSettings(rank=4),
        CartSettings(energy=0.5),
        CartSettings(lambda_="auto"),
        CartSettings(lambda_="auto", rank_ratio=0.1),
    ):
        assert not other.rule.of_numerical_rank
        assert other.plain_rule == other.rule
    assert CartSettings().plain_rule == EXPLICIT.rule
    # Restoring a model, all that it has may be kept.
    tensors = tuned(side=256)
    indexed = index_tensors(tensors, name="w")
    assert relative_error(indexed.restored(0), tensors[0].double()) < 1e-5


def test_stacked_experts_have_a_rank_each() -> None:
    low, high = tuned(side=200, count=3), [random(200, 200, seed=seed) for seed in range(3)]
    stacks = [torch.stack(pair) for pair in zip(low, high, strict=True)]
    merged = merge_tensors(stacks, name="mlp.experts.up_proj")
    assert relative_error(merged[0], merge_tensors(low, name="w").double()) < 1e-5
    assert relative_error(merged[1], merge_tensors(high, name="w").double()) < 1e-5


# What is said at the end


def models(**kinds: list[Tensor]) -> list[dict[str, Tensor]]:
    """State dicts of tensors that are given one a model."""
    return [dict(zip(kinds, held, strict=True)) for held in zip(*kinds.values(), strict=True)]


WHOLE = "3 of 4 decomposed tensors kept at least 99% .* nearly the plain average. Set rank: "


def test_a_merge_that_kept_nearly_all_says_so_once() -> None:
    same = [random(64, 64, seed=7)] * 4  # of which the average leaves rounding
    states = models(
        q=tuned(16, side=256),
        k=tuned(8, side=256),
        v=tuned(16, side=256),
        o=[random(256, 256, seed=seed) for seed in range(4)],
        up=same,
        down=same,
        gate=same,
        bias=[random(8, seed=seed) for seed in range(4)],
    )
    with pytest.warns(CartWarning, match=WHOLE + r"[34] \(half of") as told:
        merge_state_dicts(states, EXPLICIT)
    assert len(told) == 1
    text = str(told[0].message)
    assert "leave the rank rule out" in text
    assert "cart_auto" in text
    merge_state_dicts(states)
    merge_state_dicts(states, CartSettings(rank=4))
    merge_state_dicts(states, CartSettings(lambda_="auto"))
    merge_state_dicts(states, CartSettings(rank_ratio=0.08, center="base"), base=states[0])


@pytest.mark.parametrize("count", [2, 3])
def test_full_rank_is_the_average_and_said_to_be(count: int) -> None:
    states = models(w=[random(20, 24, seed=seed) for seed in range(count)])
    full = CartSettings(rank_ratio=1.0)
    if count == 2:  # that has a warning of its own, but not at full rank
        merge_state_dicts(states, full)
        return
    with pytest.warns(CartWarning, match="1 of 1 decomposed .* Leave the rank rule out"):
        merge_state_dicts(states, full)


def test_differences_of_rank_one_cannot_be_cut() -> None:
    with pytest.warns(CartWarning, match="use cart_auto") as told:
        merge_state_dicts(models(w=tuned(1, side=128)))
    assert "Set rank" not in str(told[0].message)


def test_a_merge_in_several_calls_counts_on() -> None:
    kept = Kept()
    assert kept.warning() is None
    for name in "ab":
        merge_state_dicts(models(**{name: tuned(side=256)}), EXPLICIT, kept=kept)
    for name in "cd":
        text = kept.warning()
        assert text is not None
        assert text.startswith("2 of ")
        full = [random(128, 128, seed=seed) for seed in range(4)]
        merge_state_dicts(models(**{name: full}), EXPLICIT, kept=kept)
    assert kept.warning() is None  # two of four are not most


def test_a_countdown_ends_with_the_last_tensor_of_all_threads() -> None:
    countdown = Countdown()
    countdown.skip(["steps"])
    names = [f"layer.{number}" for number in range(16)]
    for name in [*names, "steps", *names]:
        countdown.plan(name)
    tensors = tuned(side=128, count=3)
    told: list[str | None] = []

    def work(mine: list[str]) -> None:
        for name in mine:
            merge_tensors(tensors, CartSettings(rank=16), name=name, kept=countdown.kept)
            told.append(countdown.done(name))

    threads = [threading.Thread(target=work, args=(names[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (text,) = filter(None, told)
    assert text.startswith("16 of 16")
    countdown.plan("later")  # of another merge
    assert countdown.done("later") is None


def test_what_several_processes_have_kept_adds_up() -> None:
    alone, parts = Kept(), [Kept(), Kept()]
    for number in range(4):
        tensors = [random(1, 16, 16, seed=10 * number + task) for task in range(3)]
        for kept in (alone, parts[number % 2]):
            for tensor in tensors:
                kept.add(f"t{number}", total_energy(tensor), None, None)
    together = Kept()
    for part in parts:
        data = part.data(f"t{number}" for number in range(4))
        together.add_data(json.loads(json.dumps(data)))
    assert alone.warning() is not None
    assert together.warning() == alone.warning()
