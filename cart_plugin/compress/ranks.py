"""Ranks of all tensors and tasks: by a rule, or so that a size is met with the least error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cart_plugin.errors import CartError
from cart_plugin.linalg.rules import RankRule, energy_rank

Spectra = Mapping[str, Tensor]
"""Squared singular values by the tensor's name, descending, fp64; summed over stacked experts."""


class Sized(Protocol):
    """What is stored as factors of one rank, as far as their size goes."""

    @property
    def name(self) -> str:
        """Of the tensor."""

    @property
    def direction(self) -> int:
        """Numbers that one more rank costs."""

    @property
    def least_rank(self) -> int:
        """The rank below which none is chosen."""


class Decomposed(Sized, Protocol):
    """A tensor whose matrices are stored as factors of one rank: what that choice has to know."""

    @property
    def matrices(self) -> tuple[int, int, int]:
        """Their shape ``(stack, m, n)``."""


@dataclass(frozen=True)
class Matrices:
    """A tensor of which any rank may be kept, also none; a `Decomposed`.

    Attributes:
        name: the tensor's.
        matrices: their shape ``(stack, m, n)``.
        least_rank: none.
    """

    name: str
    matrices: tuple[int, int, int]
    least_rank: int = 0

    @property
    def direction(self) -> int:
        """Numbers that one more rank costs."""
        stack, m, n = self.matrices
        return stack * (m + n)


@dataclass(frozen=True)
class Together:
    """All tensors of a task at one rank; a `Sized`.

    Attributes:
        name: of them together.
        direction: what one more rank costs.
        least_rank: 1, since PEFT loads nothing without LoRA.
    """

    name: str
    direction: int
    least_rank: int = 1


def checked_rule(
    rank_ratio: float | None, rank: int | None, energy: float | None, target_size: float | None
) -> RankRule | None:
    """The rule that is given, or the default one; None with a target size.

    Raises:
        CartError: a value out of range, or two rules at once.
    """
    given = {"rank_ratio": rank_ratio, "rank": rank, "energy": energy, "target_size": target_size}
    listed = [f"{name}={value}" for name, value in given.items() if value is not None]
    if len(listed) > 1:
        raise CartError(f"{' and '.join(listed)} are two rules at once; give one of them")
    if target_size is None:
        return RankRule(rank_ratio, rank, energy)
    number = isinstance(target_size, (int, float)) and not isinstance(target_size, bool)
    if not (number and 0 < target_size <= 1):
        raise CartError(f"target_size must lie between 0 and 1 (100%), got {target_size!r}")
    return None


def by_rule(tensors: Sequence[Decomposed], rule: RankRule, spectra: Spectra) -> dict[str, int]:
    """One task's ranks by a rule.

    Args:
        tensors: those that the task has differences of.
        rule: the rule; 0 where it keeps nothing.
        spectra: needed by ``energy`` only.
    """
    ranks = {}
    for tensor in tensors:
        _, m, n = tensor.matrices
        rank = rule.fixed_rank(m, n)
        if rank is None:
            values = spectra[tensor.name]
            energy = rule.energy or 0.0
            # The spectra come from fp32 products.
            slack = 1e-6 if energy < 1 else 0.0
            rank = energy_rank(values, energy, float(values.sum()), slack=slack)
        ranks[tensor.name] = max(rank, tensor.least_rank)
    return ranks


def by_size(
    tensors: Sequence[Sized],
    spectra: Sequence[Spectra],
    itemsizes: Mapping[str, int],
    size: Callable[[Sequence[Mapping[str, int]]], int],
    target: int,
) -> list[dict[str, int]]:
    """Ranks of all tasks that meet a size with the least total squared error.

    A tensor's directions are worth their squared singular values, and each costs the same: taking
    them by worth per byte, over all tensors and tasks, is optimal up to the last one, since of one
    tensor the worth falls from each direction to the next. That is one threshold for all.

    Args:
        tensors: those that the tasks have differences of.
        spectra: one a task.
        itemsizes: bytes of a number, by the tensor's name; 1 for a size in numbers.
        size: of everything at given ranks, with all overhead; never falls where a rank grows.
        target: the size that must not be exceeded.

    Returns:
        One task's ranks each, by the tensor's name: the least ranks if even these exceed the target
        (what a user can do about it, the caller knows).
    """
    if not tensors:
        return [{} for _ in spectra]
    worth, owners = _directions(tensors, spectra, itemsizes)
    order = worth.argsort(descending=True, stable=True)
    order = order[worth[order] > 0]
    owners = owners[order]

    def ranks(count: int) -> list[dict[str, int]]:
        taken = torch.bincount(owners[:count], minlength=len(tensors) * len(spectra)).tolist()
        return [
            {
                tensor.name: tensor.least_rank + taken[task * len(tensors) + index]
                for index, tensor in enumerate(tensors)
            }
            for task in range(len(spectra))
        ]

    # The size grows with every direction: find the most that fit.
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        if size(ranks(middle)) <= target:
            low = middle
        else:
            high = middle - 1
    return ranks(low)


def by_size_at_one_rank(
    tensors: Sequence[Sized],
    spectra: Sequence[Spectra],
    itemsizes: Mapping[str, int],
    size: Callable[[Sequence[Mapping[str, int]]], int],
    target: int,
) -> list[dict[str, int]]:
    """As `by_size`, where all tensors of a task are stored at one rank, at least 1.

    One more rank gives each tensor its next direction, where it has one, and costs the same at any
    rank. So a task is one tensor, whose squared singular values are the sums over all of them.
    """
    together = Together("all", sum(t.direction * itemsizes[t.name] for t in tensors))
    longest = max((len(values) for found in spectra for values in found.values()), default=0)
    sums = []
    for found in spectra:
        values = torch.zeros(longest, dtype=torch.float64, device="cpu")
        for own in found.values():
            values[: len(own)] += own
        sums.append({together.name: values})

    def each(chosen: Sequence[Mapping[str, int]]) -> list[dict[str, int]]:
        names = [tensor.name for tensor in tensors]
        return [dict.fromkeys(names, ranks[together.name]) for ranks in chosen]

    sizes = {together.name: 1}  # its direction is in bytes already
    return each(by_size([together], sums, sizes, lambda chosen: size(each(chosen)), target))


def _directions(
    tensors: Sequence[Sized], spectra: Sequence[Spectra], itemsizes: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """Worth per byte of every direction above the least ranks, and whose it is."""
    worths, owners = [], []
    for task, found in enumerate(spectra):
        for index, tensor in enumerate(tensors):
            values = found[tensor.name][tensor.least_rank :]
            # Rounding may leave tiny values out of order; directions come in order all the same.
            values = values.cummin(0).values if len(values) else values
            worths.append(values / (tensor.direction * itemsizes[tensor.name]))
            owners.append(torch.full_like(values, task * len(tensors) + index, dtype=torch.int64))
    return torch.cat(worths), torch.cat(owners)
