"""What the methods would make of a weight, from the differences that are measured anyway."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.rounding import beyond_rounding
from cart_plugin.linalg.svd import share_of_rank
from cart_plugin.merging.informed import MOST_INFORMED, Change, informed_sum, sum_of_low_rank
from cart_plugin.merging.least_interference import least_interference
from cart_plugin.merging.settings import CartSettings
from cart_plugin.merging.spans import leading

AVERAGE = "average"
TASK_ARITHMETIC = "task_arithmetic"
CART = "cart"
AUTO = "cart_auto"
AUTO_WITH_BASE = "cart_auto with base"
MERGED = "merged"

SCALE = 0.3
"""Of task arithmetic, whose tools have it as the default or recommend it."""

ALONE = CartSettings(lambda_="auto", center="average")
"""`cart_auto` without a base."""
INFORMED = CartSettings(lambda_="auto")
"""The same with one."""


@dataclass
class Differences:
    """One difference a model, from one centre.

    Attributes:
        parts: their leading directions, ``(stack, m, K)`` and so on; coordinates may stand for
            rows and columns.
        energies: squared norms of all of each, ``(T, stack)``, in fp64.
        rounding: what of them is rounding (`cart_plugin.linalg.rounding`), the same.
        inner: inner products of all of them, ``(T, T)``, in fp64.
    """

    parts: list[LowRank]
    energies: Tensor
    rounding: Tensor
    inner: Tensor


def merges_of(
    offset: Tensor,
    shares: Sequence[float],
    centred: Differences,
    rounding: Sequence[Tensor | None],
    from_base: Differences | None,
    of_many: Callable[[], Iterable[Change]],
) -> Iterator[tuple[str, Tensor]]:
    """What the methods add to the base or, without one, to the average.

    Args:
        offset: the average less the base, ``(stack, m, n)``; zero without one.
        shares: of the models.
        centred: of the rank that `cart_auto` keeps, or more; `cart` keeps fewer.
        rounding: what `cart_auto` takes for rounding in those of the models that count
            (`cart_plugin.merging.differences.Inputs.rounding_in`).
        from_base: of the rank that it keeps with a base model, or more.
        of_many: what more than `MOST_INFORMED` models differ by from one of them, without a base.
    """
    count = len(shares)
    counting = [(index, count * share) for index, share in enumerate(shares) if share]
    yield AVERAGE, offset
    if from_base is not None:
        yield TASK_ARITHMETIC, SCALE * count * offset
    if count > 2:  # of two the differences from the average are opposite
        yield CART, _cart(offset, counting, centred)
    if min(shares) < 0:  # which `cart_auto` does not take
        return

    def disturbing_least() -> Tensor:
        if len(counting) > MOST_INFORMED:
            known = None if from_base is None else _changes(offset, counting, from_base)
            added = sum_of_low_rank(of_many() if known is None else known, offset.shape[-1])
            if added is not None:
                return added.to(offset.device)
        rank = rank_of(ALONE, offset.shape)

        def real(index: int, noise: Tensor | None) -> LowRank:
            part = leading(centred.parts[index], rank)
            if noise is None:
                return part
            energy = centred.energies[index].to(part.S.device)
            return beyond_rounding(part, energy, noise.to(energy.device))

        pairs = zip(counting, rounding, strict=True)
        parts = ((real(index, own), weight) for (index, weight), own in pairs)
        return least_interference(parts, rounding=rounding).to(offset.device)

    others = functools.cache(disturbing_least)
    if count > 2:
        yield AUTO, offset + others()
    if from_base is not None and len(counting) <= MOST_INFORMED:
        added = informed_sum(_changes(offset, counting, from_base), offset, others)
        yield AUTO_WITH_BASE, offset + added.to(offset.device)


def _changes(
    offset: Tensor, counting: Iterable[tuple[int, float]], from_base: Differences
) -> Iterator[Change]:
    """What `cart_auto` takes of the changes: of those that are factors perhaps not all."""
    rank = rank_of(INFORMED.informed, offset.shape)
    for index, weight in counting:
        part = from_base.parts[index]
        energy = from_base.energies[index].to(part.S.device)
        yield Change.of(leading(part, rank), weight, energy, from_base.rounding[index], part.S)


def _cart(offset: Tensor, counting: Iterable[tuple[int, float]], centred: Differences) -> Tensor:
    """What `cart` adds, at its defaults, from parts that hold more."""
    total = offset.clone()
    rank = rank_of(CartSettings(), offset.shape)
    for index, weight in counting:
        first = leading(centred.parts[index], rank)
        energy, rounding = (
            found[index].to(first.S.device) for found in (centred.energies, centred.rounding)
        )
        share_of_rank(first, energy, rounding).add_to_(total, weight)
    return total


def rank_of(settings: CartSettings, shape: Sequence[int]) -> int:
    """The fixed rank of settings, of matrices ``(stack, m, n)``."""
    return settings.rule.fixed_rank(*shape[1:]) or 0
