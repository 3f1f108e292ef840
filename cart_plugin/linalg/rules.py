"""How many singular directions to keep."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cart_plugin.errors import CartError
from cart_plugin.linalg.rounding import rounding_beyond, rounding_that_tells

DEFAULT_RANK_RATIO = 0.08
RANK_RULES = ("rank_ratio", "rank", "energy")
"""The rules' names, of which one may be given."""

# Directions that hold this share of a squared Frobenius norm are all that there is. No epsilon
# would do: rounding in stored weights is an estimate (`cart_plugin.linalg.rounding`).
NEARLY_ALL = 0.99
SHARE_OF_NUMERICAL_RANK = 1 / 8


@dataclass(frozen=True)
class RankRule:
    """How many singular directions to keep: one of a share, a count or an energy.

    Attributes:
        rank_ratio: share of the full rank, ``k = max(1, floor(rank_ratio * min(m, n)))`` (the
            paper's rule); 0 keeps nothing. The default rule, at 0.08, when none is given.
        rank: ``k`` itself, cut at ``min(m, n)``; 0 keeps nothing.
        energy: the smallest ``k`` whose squared singular values reach this share of their sum; 0
            keeps nothing.
        of_numerical_rank: the ``k`` of ``rank_ratio`` is for matrices of full rank. Where these
            directions hold nearly all of a matrix, it has a low numerical rank, the smallest ``r``
            that holds 99 % of its squared Frobenius norm (of what is not known to be rounding), and
            keeps ``max(1, floor(r / 8))``.

    Raises:
        CartError: a value that is no number or out of range, two rules at once, or a numerical
            rank without a ``rank_ratio``.
    """

    rank_ratio: float | None = None
    rank: int | None = None
    energy: float | None = None
    of_numerical_rank: bool = False

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in RANK_RULES}
        given = {name: value for name, value in values.items() if value is not None}
        if len(given) > 1:
            listed = " and ".join(f"{name}={value}" for name, value in given.items())
            raise CartError(f"{listed} are two rank rules at once; give one of them")
        if not given:
            object.__setattr__(self, "rank_ratio", DEFAULT_RANK_RATIO)
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise CartError(f"{name} must be a number, got {value!r}")
        if self.of_numerical_rank and self.rank_ratio is None:
            raise CartError(f"of_numerical_rank needs a rank_ratio, got {', '.join(given)}")
        if self.rank_ratio is not None and not 0 <= self.rank_ratio <= 1:
            raise CartError(f"rank_ratio must lie between 0 and 1, got {self.rank_ratio}")
        if self.energy is not None and not 0 <= self.energy <= 1:
            raise CartError(f"energy must lie between 0 and 1, got {self.energy}")
        if self.rank is not None:
            if not (self.rank >= 0 and self.rank % 1 == 0):
                raise CartError(f"rank must be 0 or a positive whole number, got {self.rank}")
            object.__setattr__(self, "rank", int(self.rank))

    @property
    def keeps_nothing(self) -> bool:
        """Whether the rule asks for rank 0, that is, for plain averaging."""
        return 0 in (self.rank_ratio, self.rank, self.energy)

    def fixed_rank(self, m: int, n: int) -> int | None:
        """The rank kept of an ``(m, n)`` matrix, or None if that depends on its spectrum.

        With `of_numerical_rank`, the most: what is kept of a matrix of full rank.
        """
        if self.keeps_nothing:
            return 0
        if self.energy is not None:
            return None
        if self.rank is not None:
            return min(self.rank, m, n)
        assert self.rank_ratio is not None
        return max(1, math.floor(self.rank_ratio * min(m, n)))


def energy_rank(values: Tensor, energy: float, total: float, *, slack: float) -> int:
    """The smallest rank whose squared singular values reach a share of their sum.

    Args:
        values: squared singular values, ``(n,)``, descending, in fp64.
        energy: the share, above 0.
        total: their sum, or the matrix's squared Frobenius norm where that is more accurate.
        slack: relative; how far rounding may have moved the sums, so that it does not turn "all of
            it" into more directions than there are.

    Returns:
        The rank; all directions where rounding keeps even these from reaching the share, 0 where
        there is nothing to keep.
    """
    if total == 0:
        return 0
    reached = values.cumsum(0) >= energy * total * (1 - slack)
    return int(reached.to(torch.int8).argmax()) + 1 if bool(reached.any()) else len(values)


def numerical_rank(
    values: Tensor, total: float, rounding: float = 0.0, beyond: float = 0.0
) -> int | None:
    """The smallest rank that holds nearly all of a matrix, but for rounding.

    Args:
        values: its leading squared singular values, ``(k,)``, descending, in fp64.
        total: its squared Frobenius norm.
        rounding: what of that is rounding (`cart_plugin.linalg.rounding`).
        beyond: the part of the rounding outside of the leading directions.

    Returns:
        The rank, 0 for a matrix of zeros; None if it is above ``k``.
    """
    if float(values.sum()) + beyond < NEARLY_ALL * total:
        return None
    return energy_rank(values, NEARLY_ALL, total - rounding, slack=0.0)


def numerical_ranks(
    values: Tensor, totals: Tensor, rounding: Tensor | None, m: int, n: int
) -> list[int | None]:
    """`numerical_rank` of each matrix of a stack.

    Args:
        values: leading singular values, ``(stack, k)``.
        totals: squared norms, ``(stack,)``.
        rounding: what of them is rounding, ``(stack,)`` in fp64; None for nothing.
        m: rows of the matrices.
        n: their columns.
    """
    # A few numbers, and a decision on each: on a GPU every one of them would be waited for.
    values, totals = values.cpu(), totals.cpu()
    squares = values.double().square()
    rounding = torch.zeros_like(totals) if rounding is None else rounding.cpu()
    # A matrix that is mostly rounding has no rank to speak of.
    rounding = rounding_that_tells(totals, rounding)
    beyond = rounding_beyond(rounding, values.shape[-1], m, n)
    numbers = zip(totals.tolist(), rounding.tolist(), beyond.tolist(), strict=True)
    return [numerical_rank(one, *rest) for one, rest in zip(squares, numbers, strict=True)]
