"""Variants of `cart_plugin.merging.least_interference`, as dense formulas.

Only what is tried in `search` is here: what survived is in the plugin, in better numerics. A test
holds `merge_factors` of the default variant against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.peers import polar
from cart_plugin.linalg.factors import LowRank
from cart_plugin.merging.least_interference import AUTO_RANK_RATIO, PULL, RIDGE

REVISION = 1  # raised when a variant gives other weights


@dataclass(frozen=True)
class Variant:
    """How the truncated task vectors ``D_t`` of one weight are combined.

    Attributes:
        kind: `closed_form`, `cart` (their sum), `whitened` (their singular vectors made orthogonal
            across tasks, as TSV-M does) or `coefficients` (one factor a task, by least squares on
            the objective of the closed form).
        rank: share of the directions, `donoho` (Gavish and Donoho's threshold for unknown noise,
            arXiv 1305.5870), `energy` (as many as hold 90 %), `both` (that, but no more than the
            default share), or None for all.
        ridge: relative to the mean eigenvalue of the summed covariances.
        power: of the singular values in a task's covariance.
        norm: what a task's covariance is divided by: its `trace`, its largest eigenvalue
            (`spectral`), or `none`.
        side: whose covariance: `input`, `output`, or the mean of both results.
        pull: strength of the pull towards the sum of the task vectors, as the ridge is given.
        target: that sum's scale: a number, or `full` (1 / rho), `norm` (1 / sqrt(rho)).
        least: below this, rho counts as this.
        scale: of the result: a number, or a rule: `ridge` (undo the ridge's shrinkage of the
            trace), `explained` (2 / (1 + R^2) for the share R^2 of the tasks' responses that is
            kept), `response` (1 / R: responses as strong as the tasks' own), `trace` (1 / R^2).
        twice: solve again for what is left of the task vectors, and add that.
    """

    kind: str = "closed_form"
    rank: float | str | None = AUTO_RANK_RATIO
    ridge: float = RIDGE
    power: float = 2.0
    norm: str = "spectral"
    side: str = "input"
    pull: float = PULL
    target: float | str = "full"
    least: float = 0.1
    scale: float | str = 1.0
    twice: bool = False


def merge_factors(tasks: Sequence[LowRank], variant: Variant) -> Tensor:
    """The matrix (m, n) to add to the centre.

    Args:
        tasks: all singular directions of the tasks' centred differences.
        variant: how to combine them.
    """
    kept = [_cut(task, variant.rank) for task in tasks]
    if variant.kind == "cart":
        return float(variant.scale) * _target(kept, variant)
    if variant.kind == "whitened":
        return float(variant.scale) * _whitened(kept)
    if variant.kind == "coefficients":
        return float(variant.scale) * _coefficients(kept, variant)
    if variant.side == "output":
        return _closed_form([_transposed(task) for task in kept], variant).mT
    inputs = _closed_form(kept, variant)
    if variant.side == "both":
        return (inputs + _closed_form([_transposed(task) for task in kept], variant).mT) / 2
    return inputs


def _cut(task: LowRank, rank: float | str | None) -> LowRank:
    squares = task.S.square()
    if rank is None:
        count = len(task.S)
    elif rank == "donoho":
        m, n = len(task.U), task.Vh.shape[-1]
        beta = min(m, n) / max(m, n)
        # Their rational approximation of the threshold's multiple of the median.
        threshold = (0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43) * task.S.median()
        count = int((threshold < task.S).sum())
    elif rank in ("energy", "both"):
        count = int((squares.cumsum(0) < 0.9 * squares.sum()).sum()) + 1
        if rank == "both":
            count = min(count, math.floor(AUTO_RANK_RATIO * len(task.S)))
    else:
        count = math.floor(float(rank) * len(task.S))
    count = max(1, min(count, len(task.S)))
    return LowRank(task.U[:, :count], task.S[:count], task.Vh[:count])


def _target(tasks: Sequence[LowRank], variant: Variant) -> Tensor:
    """The sum of the task vectors, scaled."""
    plain = _sum(tasks)
    if not isinstance(variant.target, str):
        return variant.target * plain
    energy = sum((task.S.square().sum() for task in tasks), torch.zeros(()))
    kept = (plain.square().sum() / energy.clamp_min(1e-30)).clamp_min(variant.least)
    return plain / kept.pow({"full": 1.0, "norm": 0.5}[variant.target])


def _transposed(task: LowRank) -> LowRank:
    return LowRank(task.Vh.mT, task.S, task.U.mT)


def _sum(tasks: Sequence[LowRank]) -> Tensor:
    return sum((task.dense() for task in tasks), torch.zeros(()))


def _eigenvalues(task: LowRank, variant: Variant) -> Tensor:
    """Of the task's stand-in for its inputs' covariance, along its right singular vectors."""
    powers = task.S.pow(variant.power)
    by = {"trace": powers.sum(), "spectral": powers.max(), "none": torch.ones(())}[variant.norm]
    return powers / by if by > 0 else powers


def _closed_form(tasks: Sequence[LowRank], variant: Variant) -> Tensor:
    values = [_eigenvalues(task, variant) for task in tasks]
    pairs = list(zip(tasks, values, strict=True))
    covariances = [(task.Vh.mT * value) @ task.Vh for task, value in pairs]
    gram = sum(covariances, torch.zeros(()))
    if not gram.any():
        return torch.zeros(len(tasks[0].U), len(gram))
    mean = gram.diagonal().mean()
    factor = torch.linalg.cholesky(gram + variant.ridge * mean * torch.eye(len(gram)))

    def solve(right: Tensor) -> Tensor:
        return torch.cholesky_solve(right.mT, factor).mT

    right = sum(((task.U * (task.S * value)) @ task.Vh for task, value in pairs), torch.zeros(()))
    right = right + variant.pull * mean * _target(tasks, variant)
    merged = solve(right)
    if variant.twice:
        merged = merged + solve(right - merged @ gram)
    return _scale(merged, right, gram, solve(gram), pairs, variant.scale) * merged


def _scale(
    merged: Tensor,
    right: Tensor,
    gram: Tensor,
    shrunk: Tensor,
    pairs: Sequence[tuple[LowRank, Tensor]],
    rule: float | str,
) -> Tensor | float:
    if not isinstance(rule, str):
        return rule
    if rule == "ridge":
        return gram.trace() / (gram @ shrunk).trace()
    energy = sum(((task.S.square() * value).sum() for task, value in pairs), torch.zeros(()))
    explained = (merged * right).sum() / energy
    return {
        "explained": 2 / (1 + explained),
        "response": (energy / ((merged @ gram) * merged).sum()).sqrt(),
        "trace": 1 / explained,
    }[rule]


def _whitened(tasks: Sequence[LowRank]) -> Tensor:
    left = polar(torch.cat([task.U for task in tasks], dim=1))
    right = polar(torch.cat([task.Vh.mT for task in tasks], dim=1))
    return (left * torch.cat([task.S for task in tasks])) @ right.mT


def _coefficients(tasks: Sequence[LowRank], variant: Variant) -> Tensor:
    """``sum_t a_t D_t`` with the a_t that minimise the interference, ridge towards 0."""
    dense = [task.dense() for task in tasks]
    covariances = [(task.Vh.mT * _eigenvalues(task, variant)) @ task.Vh for task in tasks]
    gram = sum(covariances, torch.zeros(()))
    flat = torch.stack([matrix.flatten() for matrix in dense])
    system = flat @ torch.stack([(matrix @ gram).flatten() for matrix in dense]).mT
    right = flat @ sum(
        ((matrix @ c).flatten() for matrix, c in zip(dense, covariances, strict=True)),
        torch.zeros(()),
    )
    if not system.any():
        return torch.zeros_like(dense[0])
    system.diagonal().add_(1e-3 * system.diagonal().mean())
    return (torch.linalg.solve(system, right) @ flat).view(dense[0].shape)
