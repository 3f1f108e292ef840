"""Variants of `cart_plugin.merging.informed`, as dense formulas, for `study`.

What survived is in the plugin, in better numerics; a test holds the default variant against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.data_free import factored, tsvm
from benchmarks.common.peers import svc
from cart_plugin.linalg.factors import LowRank
from cart_plugin.merging.informed import (
    INFORMED_LEAST_KEPT,
    INFORMED_RANK_RATIO,
    INFORMED_RIDGE,
    LEAST_SHARE,
)
from cart_plugin.merging.least_interference import AUTO_RANK_RATIO, least_interference

REVISION = 4  # raised when a variant gives other weights


@dataclass(frozen=True)
class Informed:
    """How the task vectors of one weight are combined.

    Attributes:
        source: of the covariances: the task vectors (`base`), or their differences from the mean
            (`mean`: then all is as without a base, and the others of these have no meaning).
        rank: share of the directions in the covariances; None for all.
        ridge: relative to the mean eigenvalue of the summed covariances.
        norm: what a task's covariance is divided by: its largest eigenvalue (`spectral`), or its
            `trace`.
        over: which eigenvalues the mean is of: those of the directions that are `known`, or `all`.
        others: share of the average's ``tau^T tau`` that is added to each task's covariance: inputs
            that the others moved are a task's own, too, in some measure.
        pull: what the ridge pulls to: the mean and the sum of what each task lacks of it on its own
            inputs, over rho (`own`); the `mean` alone; as strong as the task vectors in what they
            share (`strong`); the `sum`; TSV-M (`tsvm`); CART's own sum over rho (`cart`), which
            takes a second decomposition; or the base itself (`zero`).
        least: rho, for the pulls that have one.
        keep: share of each eigendirection that is solved for: `ridge`, `exponential`, or `hard`
            (ASWUDI's count of directions whole, the others not at all).
        rescaled: afterwards, as SVC does.
    """

    source: str = "base"
    rank: float | None = INFORMED_RANK_RATIO
    ridge: float = INFORMED_RIDGE
    norm: str = "trace"
    over: str = "known"
    others: float = 0.0
    pull: str = "own"
    least: float = INFORMED_LEAST_KEPT
    keep: str = "ridge"
    rescaled: bool = False


def combine(tasks: Sequence[LowRank], variant: Informed) -> Tensor:
    """The matrix (m, n) to add to the base.

    Args:
        tasks: all singular directions of the task vectors ``W_t - W_base``.
        variant: how to combine them.
    """
    taus = [task.dense() for task in tasks]
    if variant.source == "mean":
        return _centred(taus)
    kept = [_known(_cut(task, variant.rank)) for task in tasks]
    mean = sum(taus, torch.zeros_like(taus[0])) / len(taus)
    common = variant.others * mean.mT @ mean
    gram, fitted = torch.zeros_like(common), torch.zeros_like(mean)
    for tau, task in zip(taus, kept, strict=True):
        if not len(task.S):  # no inputs of its own
            continue
        covariance = (task.Vh.mT * task.S.square()) @ task.Vh + common
        if variant.norm == "trace":
            covariance /= covariance.trace()
        else:
            covariance /= _largest_eigenvalue(covariance) if variant.others else task.S[0].square()
        gram += covariance
        fitted += tau @ covariance
    target = _target(taus, kept, variant)
    if not gram.any():
        return target
    known = sum(len(task.S) for task in kept)
    count = min(known, len(gram)) if variant.over == "known" else len(gram)
    shift = variant.ridge * gram.trace() / count
    merged = target + _solve(gram, fitted - target @ gram, shift, variant.keep)
    return svc(merged, taus) if variant.rescaled else merged


def _largest_eigenvalue(matrix: Tensor) -> Tensor:
    """To a few digits, by the power method: a norm needs no more."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(len(matrix), 4, generator=generator)
    for _ in range(8):
        found = torch.linalg.qr(matrix @ found).Q
    return torch.linalg.vector_norm(matrix @ found, dim=0).max()


def _cut(task: LowRank, share: float | None) -> LowRank:
    count = len(task.S) if share is None else max(1, int(share * len(task.S)))
    return LowRank(task.U[:, :count], task.S[:count], task.Vh[:count])


def _known(task: LowRank) -> LowRank:
    """Without directions that are rounding, all those of a weight that the task did not change."""
    count = int((LEAST_SHARE * task.S[0] < task.S).sum())
    return LowRank(task.U[:, :count], task.S[:count], task.Vh[:count])


def _centred(taus: Sequence[Tensor]) -> Tensor:
    """The method without a base: its term of least interference around the mean."""
    mean = sum(taus, torch.zeros_like(taus[0])) / len(taus)
    parts = [_cut(factored(tau - mean), AUTO_RANK_RATIO) for tau in taus]
    return mean + least_interference((part, 1.0) for part in parts)


def _target(taus: Sequence[Tensor], kept: Sequence[LowRank], variant: Informed) -> Tensor:
    pull = variant.pull
    sum_ = sum(taus, torch.zeros_like(taus[0]))
    mean = sum_ / len(taus)
    if pull == "strong":
        return _strong(taus)
    if pull == "own":
        lacking = [(tau - mean) @ one.Vh.mT @ one.Vh for tau, one in zip(taus, kept, strict=True)]
        return mean + _over_rho(lacking, variant.least)
    if pull == "tsvm":
        return tsvm([factored(tau) for tau in taus])
    if pull == "cart":
        parts = [_cut(factored(tau - mean), AUTO_RANK_RATIO) for tau in taus]
        return mean + _over_rho([part.dense() for part in parts], variant.least)
    return {"mean": mean, "sum": sum_, "zero": torch.zeros_like(mean)}[pull]


def _over_rho(parts: Sequence[Tensor], least: float) -> Tensor | float:
    """Their sum at full strength; see `cart_plugin.merging.least_interference`."""
    energy = sum((part.square().sum() for part in parts), torch.zeros(()))
    if energy == 0:
        return 0.0
    total = sum(parts, torch.zeros_like(parts[0]))
    return total / (total.square().sum() / energy).clamp_min(least)


def _strong(taus: Sequence[Tensor]) -> Tensor:
    """The mean over kappa, at most their sum."""
    mean = sum(taus, torch.zeros_like(taus[0])) / len(taus)
    energy = sum((tau.square().sum() for tau in taus), torch.zeros(())) / len(taus)
    common = mean.square().sum()
    return mean * min(float(energy / common), len(taus)) if common > 0 else mean


def _solve(gram: Tensor, right: Tensor, shift: Tensor, keep: str) -> Tensor:
    """``right Q diag(h / l) Q'`` for the eigenvalues l of ``gram`` and the share h of each."""
    if keep == "ridge":
        factor = torch.linalg.cholesky(gram + shift * torch.eye(len(gram)))
        return torch.cholesky_solve(right.mT, factor).mT
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(1e-12 * values[-1])
    if keep == "exponential":
        share = -torch.expm1(-values / shift)
    else:
        count = int((values.sqrt().sum().square() / values.sum()).ceil())
        share = (torch.arange(len(values)) >= len(values) - count).to(values.dtype)
    return (right @ vectors * (share / values)) @ vectors.mT
