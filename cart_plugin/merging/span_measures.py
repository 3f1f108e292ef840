"""What a merge keeps of each model, and how much the models have in common, from factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.precision import full_precision

# Singular values below this share of the largest are none: rows of an adapter that are equal.
_ROUNDING = 1e-6


class Answers(NamedTuple):
    """How models answer on their own inputs, and a merge in their place; ``(T,)`` each, in fp64.

    A model's own inputs are those that ``tau_t^T tau_t`` stands for, scaled to a trace of 1
    (`cart_plugin.merging.informed`); its answer is ``tau_t`` of them.

    Attributes:
        own: squared norm of each model's answer.
        along: inner product of the merge's answer with it.
        beside: squared norm of the difference between the two.
    """

    own: Tensor
    along: Tensor
    beside: Tensor


class Overlaps(NamedTuple):
    """What pairs of models have in common, ``(T, T)`` each, in fp64.

    Attributes:
        inner: inner products of their differences.
        outputs: how much of the smaller column space (of B) lies in the other one, 0 to 1; 0 where
            a model does not change the weight.
        inputs: the same of the row spaces (of A).
    """

    inner: Tensor
    outputs: Tensor
    inputs: Tensor


def answers(parts: Sequence[LowRank], total: Tensor) -> Answers:
    """Compare a merged difference with the models', summed over a stack.

    Args:
        parts: the models' differences, ``(stack, m, k)`` and so on, or those of a
            `cart_plugin.merging.spans.Span` in its coordinates.
        total: the merged difference, ``(stack, m, n)``, in the same coordinates.
    """
    found = torch.zeros(3, len(parts), dtype=torch.float64, device="cpu")
    with full_precision(total.device):
        for index, part in enumerate(parts):
            size = torch.linalg.vector_norm(part.S, dim=-1)[..., None]
            shares = torch.where(size > 0, part.S / torch.where(size > 0, size, 1), 0)
            own = part.U * (part.S * shares)[..., None, :]
            got = total @ (part.Vh.mT * shares[..., None, :])
            found[0, index] = own.square().sum()
            found[1, index] = (own * got).sum()
            found[2, index] = (own - got).square().sum()
    return Answers(*found)


def overlaps(parts: Sequence[LowRank]) -> Overlaps:
    """Compare the models of `answers` with each other; spaces as the mean over a stack."""
    left = torch.cat([part.U for part in parts], dim=-1)
    right = torch.cat([part.Vh for part in parts], dim=-2)
    sizes = torch.cat([part.S for part in parts], dim=-1)
    real = torch.cat([_real(part) for part in parts], dim=-1)
    ranks = torch.tensor([part.rank for part in parts], device="cpu")
    owners = torch.arange(len(parts), device="cpu").repeat_interleave(ranks)
    is_of = torch.nn.functional.one_hot(owners, len(parts)).to(sizes)  # (K, T)

    def summed(products: Tensor, scales: Tensor) -> Tensor:
        scaled = scales[..., :, None] * products * scales[..., None, :]
        return (is_of.mT @ scaled @ is_of).sum(dim=0, dtype=torch.float64).cpu()

    with full_precision(left.device):
        outer, within = left.mT @ left, right @ right.mT
        counts = (real.sum(dim=0) @ is_of).double().cpu()
        fewer = torch.minimum(counts[:, None], counts).clamp_min(1)
        return Overlaps(
            summed(outer * within, sizes),
            summed(outer.square(), real) / fewer,
            summed(within.square(), real) / fewer,
        )


def _real(part: LowRank) -> Tensor:
    """1 for directions, 0 for what is none."""
    least = _ROUNDING * part.S[..., :1]
    return torch.gt(part.S, least).to(part.S.dtype)
