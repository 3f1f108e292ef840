"""What storing weights in few bits leaves in their differences: noise of full rank.

An adapter that was merged into bf16 weights is of low rank no longer: rounding adds 2 to 15 % to
the squared norm of what LoRA changed of the language model of ``benchmarks/llm``. Rounding a value
w to a grid of spacing ``u = eps 2^floor(log2 |w|)`` adds an error of variance ``u^2 / 12``. The
mean of ``u^2`` is 0.54 of that of ``(eps w)^2`` for normally distributed weights of any scale, so
that the errors in a matrix W have a squared norm of ``eps^2 ||W||_F^2 / 22``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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


def difference_rounding(weights: Sequence[Tensor], base: Tensor | None = None) -> list[Tensor]:
    """`rounding_energy` of each weight's difference from a base, or from what has no errors.

    The base has errors of its own only if it is in fewer bits than the weight: else it is what
    training started from.

    Args:
        weights: ``(stack, m, n)`` each.
        base: the same.
    """
    eps = 0.0 if base is None else stored_eps(base)
    found, own = [], None
    for weight in weights:
        energy = rounding_energy(weight)
        if base is not None and eps > stored_eps(weight):
            own = rounding_energy(base) if own is None else own
            energy = energy + own
        found.append(energy)
    return found


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
