"""What storing weights in few bits leaves in their differences: noise of full rank.

An adapter that was merged into bf16 weights is of low rank no longer: rounding adds 2 to 15 % to
the squared norm of what LoRA changed of the language model of ``benchmarks/llm``. Rounding a value
w to a grid of spacing ``u = eps 2^floor(log2 |w|)`` adds an error of variance ``u^2 / 12``. The
mean of ``u^2`` is 0.54 of that of ``(eps w)^2`` for normally distributed weights of any scale, so
that the errors in a matrix W have a squared norm of ``eps^2 ||W||_F^2 / 22``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.gram import total_energy

_NARROW = (torch.bfloat16, torch.float16)
_SPREAD = 22


def rounding_energy(weights: Tensor) -> Tensor:
    """The squared norms to expect of the rounding errors of weights.

    Args:
        weights: ``(stack, m, n)``. What was stored in fewer bits than its dtype has, such as a
            model in bf16 that was loaded in fp32, is told by its values.

    Returns:
        ``(stack,)``, in fp64.
    """
    eps = stored_eps(weights)
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    return total_energy(wide) * (eps**2 / _SPREAD)


def stored_eps(weights: Tensor) -> float:
    """The epsilon of `stored_dtype`."""
    return torch.finfo(stored_dtype(weights)).eps


def stored_dtype(weights: Tensor) -> torch.dtype:
    """The narrowest of fp32, bf16 and fp16 that holds all values, or their own dtype."""
    if weights.dtype not in (torch.float32, torch.float64):
        return weights.dtype
    lines = weights.reshape(-1, weights.shape[-1])
    for dtype in _NARROW:
        # One line tells nearly always.
        if all(torch.equal(part, part.to(dtype).to(part.dtype)) for part in (lines[:1], lines)):
            return dtype
    return weights.dtype


def is_rounded(weights: Tensor) -> bool:
    """Whether weights are stored in so few bits that rounding shows in what training changes."""
    return stored_dtype(weights) in _NARROW


def difference_rounding(weights: Sequence[Tensor], other: Tensor | None = None) -> list[Tensor]:
    """`rounding_energy` of each weight's difference from another one, or from what has no errors.

    That is so of the base that training started from, in however few bits: what was trained was
    the stored one.

    Args:
        weights: ``(stack, m, n)`` each.
        other: the same, of another trained model.
    """
    beside = 0.0 if other is None else rounding_energy(other)
    return [rounding_energy(weight) + beside for weight in weights]


def centred_rounding(own: Sequence[Tensor], shares: Sequence[float]) -> list[Tensor]:
    """The same of each weight's difference from the weighted mean of them all.

    Args:
        own: what rounding adds to each weight, ``(stack,)``.
        shares: weights of the mean, which sum to 1.
    """
    mean = sum(share**2 * one for share, one in zip(shares, own, strict=True))
    return [mean + (1 - 2 * share) * one for share, one in zip(shares, own, strict=True)]


def rounding_that_tells(total: Tensor, rounding: Tensor) -> Tensor:
    """The rounding in differences, or nothing where it is most of them: see `is_drowned`."""
    return torch.where(is_drowned(total, rounding), 0, rounding)


def is_drowned(total: Tensor, rounding: Tensor) -> Tensor:
    """Whether rounding is the larger part of differences, ``(stack,)``.

    Then they say nothing of what they are of. Of changes that are smaller than the spacing most is
    rounded away: the estimate may be more than there is.

    Args:
        total: squared norms of differences of weights.
        rounding: of the weights, as `rounding_energy` has it.
    """
    return rounding > total / 2


def rounding_beyond(rounding: Tensor, k: int, m: int, n: int) -> Tensor:
    """What of the rounding lies outside of the leading directions of ``(m, n)`` matrices, at most.

    That is the share of a matrix of independent entries outside of any k columns and k rows; the
    leading directions hold more of it than others.

    Args:
        rounding: squared norms, ``(stack,)``.
        k: the number of leading directions.
        m: rows.
        n: columns.
    """
    return rounding * ((1 - k / m) * (1 - k / n))


def rounding_left(values: Tensor, rounding: Tensor, m: int, n: int) -> Tensor:
    """What of the rounding to expect outside of the leading directions of ``(m, n)`` matrices.

    Leading singular values above the `rounding_edge` are of something else, beside which the
    rounding is that of `rounding_beyond`; the others are rounding's own largest ones, as Marchenko
    and Pastur's law has them.

    Args:
        values: the leading singular values, ``(stack, k)``.
        rounding: squared norms, ``(stack,)``.
        m: rows.
        n: columns.
    """
    k = values.shape[-1]
    others = (values > rounding_edge(rounding, m, n).to(values)[..., None]).sum(dim=-1)
    left = [
        (1 - r / m) * (1 - r / n) * _energy_beyond(k - r, min(m, n) - r, max(m, n) - r)
        for r in others.tolist()
    ]
    return rounding * rounding.new_tensor(left)


@functools.cache
def _energy_beyond(k: int, p: int, q: int) -> float:
    """The share of squares outside the k leading directions of a (p, q) matrix of noise, p <= q."""
    if k <= 0 or k >= p:
        return float(k <= 0)
    ratio = p / q
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    # lambda = low + (high - low) sin^2: the roots of the density become smooth. From the top down.
    steps = torch.linspace(0, torch.pi / 2, 4097, dtype=torch.float64, device="cpu")
    middles = (steps[1:] + steps[:-1]).flip(0) / 2
    values = low + (high - low) * middles.sin().square()
    count = (middles.sin() * middles.cos()).square() / values
    counted = count.cumsum(0) / count.sum()
    squares = (count * values).cumsum(0) / (count * values).sum()
    last = int(torch.searchsorted(counted, k / p).clamp_max(len(counted) - 1))
    return float(1 - squares[last])


def rounding_edge(energy: Tensor, m: int, n: int) -> Tensor:
    """The largest singular value to expect of errors with independent entries, ``(stack,)``.

    Of an ``(m, n)`` matrix of variance v it is ``sqrt(v) (sqrt(m) + sqrt(n))`` (Marchenko and
    Pastur's edge).

    Args:
        energy: squared norms of the errors, ``(stack,)``.
        m: rows.
        n: columns.
    """
    return (energy / (m * n)).sqrt() * (m**0.5 + n**0.5)


def edge_within(total: Tensor, rounding: Tensor, m: int, n: int) -> Tensor:
    """The `rounding_edge` of what rounding there is in differences, ``(stack,)``.

    Where it is most of them, the estimate may be more than there is.

    Args:
        total: squared norms of the differences, ``(stack,)``.
        rounding: what of them is rounding by `rounding_energy`.
        m: rows.
        n: columns.
    """
    return rounding_edge(torch.minimum(rounding, total / 2), m, n)


def beyond_rounding(
    factors: LowRank, total: Tensor, rounding: Tensor, least_share: float = 0.0
) -> LowRank:
    """The directions of differences that are no rounding; of a stack those of any matrix.

    Args:
        factors: of the differences, ``(stack, m, n)``.
        total: squared norms of the differences, ``(stack,)``.
        rounding: what of them is rounding by `rounding_energy`.
        least_share: of the largest singular value, below which directions are none, either.
    """
    values = factors.S
    edge = edge_within(total, rounding, factors.U.shape[-2], factors.Vh.shape[-1]).to(values)
    known = values > torch.maximum(least_share * values[..., :1], edge[..., None])
    count = max(1, int(known.flatten(end_dim=-2).sum(dim=-1).max()))
    values = torch.where(known, values, 0)[..., :count]
    return LowRank(factors.U[..., :count], values, factors.Vh[..., :count, :])
