"""A merge of one weight as a sum over tasks and singular directions, to be adapted one by one.

CART and `cart_auto` are both of the form ::

    merged = centre + scale * sum_t (w_t / mean(w)) * sum_i b_ti s_ti u_ti v_ti^T

where ``b_ti`` is 1 for the directions that the rank rule keeps and 0 for the others, and the scale
is CART's lambda, or 1: in the sum of least interference each direction has a strength and a right
vector of its own (`cart_plugin.merging.least_interference.by_direction`; where the base model is
taken into account, or of more than four models that LoRA may have made, those of
`cart_plugin.merging.informed`). AdaMerging (arXiv 2310.02575) adapts a factor for each task,
AdaRank (arXiv 2503.22178) the ``b_ti``, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cart_plugin.errors import CartError
from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.rules import RankRule
from cart_plugin.merging.differences import (
    Inputs,
    centre_of,
    centred_parts,
    changes_from,
    changes_of_many,
    factors_of,
    truncated,
)
from cart_plugin.merging.informed import (
    informed_by_direction,
    low_rank_by_direction,
    parts_of_low_rank,
)
from cart_plugin.merging.inputs import check_centre, check_finite, check_inputs, normalised
from cart_plugin.merging.least_interference import by_direction
from cart_plugin.merging.settings import CartSettings
from cart_plugin.merging.tensors import matrix_shape


@dataclass(frozen=True)
class Directions:
    """One weight of several models by singular directions.

    Attributes:
        centre: what is added to, in the weight's shape, in fp32 (fp64 for fp64 inputs).
        factors: one a model, of matrices ``(stack, m, n)`` (`matrix_shape`).
        kept: one a model, ``(stack, r)``: the directions that the merge keeps.
    """

    centre: Tensor
    factors: tuple[LowRank, ...]
    kept: tuple[Tensor, ...]


def directions_of(
    tensors: Sequence[Tensor],
    settings: CartSettings | None = None,
    *,
    weights: Sequence[float] | None = None,
    base: Tensor | None = None,
    name: str | None = None,
    models: Sequence[str] | None = None,
    candidates: float | None = None,
    turned: bool = False,
) -> Directions:
    """The directions of which a merge of one weight consists, and those that it leaves out.

    Args:
        tensors: one a model, all of one shape, on one device. At least two; not empty.
        settings: parameters of the method; the defaults if None.
        weights: one a model; equal if None.
        base: the base model's tensor, as in `cart_plugin.merging.cart.merge_tensors`.
        name: the tensor's name, which the solver's start depends on.
        models: the models' names, for errors.
        candidates: share of the singular directions to return, those that are kept among them. If
            None, only those that are kept. Where they are told by a base model, or LoRA has made
            many, there are no others.
        turned: the tensor is stored as (inputs, outputs); see `merge_tensors` there.

    Raises:
        CartError: as `cart_plugin.merging.cart.merge_tensors`, or more directions are kept than
            there are candidates.
    """
    settings = settings or CartSettings()
    if turned and settings.lambda_ == "auto":
        other = directions_of(
            [tensor.mT for tensor in tensors],
            settings,
            weights=weights,
            base=None if base is None else base.mT,
            name=name,
            models=models,
            candidates=candidates,
        )
        back = tuple(factors.mT for factors in other.factors)
        return Directions(other.centre.mT.contiguous(), back, other.kept)
    models, where = check_inputs(tensors, models, name)
    check_centre(base, settings.center, where)
    with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        shares = normalised(weights, len(tensors), where)
        inputs = Inputs(tensors, shares, models, name, where)
        around = base if settings.center == "base" else None
        centre = centre_of(tensors, shares, around, models, where)
        shape = matrix_shape(name, centre.shape)
        if settings.lambda_ == "auto":
            inputs.check_weights()
        told = _told(inputs, base, centre, settings)
        if told is not None:
            rank, least = max(factors.rank for factors in told.factors), min(shape[-2:])
            if candidates is not None and rank > _most(candidates, shape):
                raise CartError(
                    f"{where}: the merge keeps all of what sets the models apart, {rank} singular "
                    f"directions, but candidates={candidates} are {_most(candidates, shape)}; give "
                    f"at least {math.ceil(100 * rank / least) / 100}, or start from a scaling "
                    "factor"
                )
            return told
        known = iter(inputs.rounding_in(settings, shape))
        rounding = [next(known) if share else None for share in shares]
        found, ranks = [], []
        for tensor, model, noise in zip(tensors, models, rounding, strict=True):
            delta = tensor - centre
            check_finite(delta, [model], [tensor], where)
            factors = truncated(delta, settings, name, noise)
            ranks.append(factors.rank)
            if candidates is not None:
                rest = delta.reshape(shape)
                factors = _with_candidates(factors, rest, settings, name, candidates, where)
            found.append(factors)
        kept = [
            (factors.S > 0) & (torch.arange(factors.rank, device=factors.S.device) < rank)
            for factors, rank in zip(found, ranks, strict=True)
        ]
        if settings.lambda_ == "auto":
            counts = [len(tensors) * share for share in shares]
            found = by_direction(list(zip(found, counts, strict=True)), ranks, rounding)
        return Directions(centre, tuple(found), tuple(kept))


def _told(
    inputs: Inputs, base: Tensor | None, centre: Tensor, settings: CartSettings
) -> Directions | None:
    """The same by a base model, or for many models that LoRA may have made: all is kept."""
    if base is not None and settings.is_informed(inputs.counting):
        return _informed(inputs, base, centre, settings)
    if not settings.looks_for_low_rank(inputs.counting):
        return None
    parts = parts_of_low_rank(changes_of_many(inputs, base, settings))
    if parts is None:
        return None
    made = low_rank_by_direction(parts, matrix_shape(inputs.name, centre.shape)[-1])
    return _all_kept(inputs, centre, settings, made)


def _informed(inputs: Inputs, base: Tensor, average: Tensor, settings: CartSettings) -> Directions:
    """Directions of `cart_plugin.merging.informed.informed_sum`."""
    start = centre_of(inputs.tensors, inputs.shares, base, inputs.models, inputs.where)
    shape = matrix_shape(inputs.name, average.shape)
    changes = list(changes_from(inputs, start, None, settings))
    made, is_halved = informed_by_direction(changes, (average - start).reshape(shape))
    if is_halved:
        rounding = inputs.rounding_in(settings, shape)
        parts = list(centred_parts(inputs, average, settings, rounding))
        others = by_direction(parts, rounding=rounding)
        made = [_halved(*both) for both in zip(made, others, strict=True)]
    return _all_kept(inputs, average, settings, made)


def _halved(one: LowRank, other: LowRank) -> LowRank:
    """Half of both, side by side."""
    return LowRank(
        torch.cat([one.U, other.U], dim=-1),
        torch.cat([one.S, other.S], dim=-1) / 2,
        torch.cat([one.Vh, other.Vh], dim=-2),
    )


def _all_kept(
    inputs: Inputs, centre: Tensor, settings: CartSettings, made: Sequence[LowRank]
) -> Directions:
    """Directions of which the merge keeps all; ``made`` are those of models that have a weight."""
    known = iter(made)
    # What has no weight is not in the sums: its difference as it is, at no other strength.
    found = [
        next(known).to(centre.device)
        if share
        else truncated(tensor - centre, settings, inputs.name)
        for tensor, share in zip(inputs.tensors, inputs.shares, strict=True)
    ]
    return Directions(centre, tuple(found), tuple(factors.S > 0 for factors in found))


def _most(candidates: float, shape: Sequence[int]) -> int:
    return max(1, math.floor(candidates * min(shape[-2:])))


def _with_candidates(
    kept: LowRank,
    delta: Tensor,
    settings: CartSettings,
    name: str | None,
    candidates: float,
    where: str,
) -> LowRank:
    """The directions that are kept, and after them those of the rest of a difference.

    They are not decomposed anew, so that the merge is the same with any solver.
    """
    most = _most(candidates, delta.shape)
    if kept.rank > most:
        raise CartError(
            f"{where}: the merge keeps {kept.rank} singular directions, but "
            f"candidates={candidates} are {most}; give more candidates, or start from a lower rank"
        )
    if kept.rank == most:
        return kept
    rest = kept.add_to_(delta.clone(), -1.0)
    rule = RankRule(rank=most - kept.rank)
    others = factors_of(rest, rule, name, svd=settings.svd, seed=settings.seed)
    return LowRank(
        torch.cat([kept.U, others.U], dim=-1),
        torch.cat([kept.S, others.S], dim=-1),
        torch.cat([kept.Vh, others.Vh], dim=-2),
    )
