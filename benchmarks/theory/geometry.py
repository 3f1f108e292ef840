"""R(k) and I(k) of differences at many ranks, and what centring does to I."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import truncated_svd
from cart_plugin.merging.interference import (
    interference,
    pair_interferences,
    reconstruction_errors,
)

SHARES = (0.01, 0.02, 0.04, 0.08, 0.12, 0.16, 0.24, 0.32, 0.48, 0.64, 0.8, 1.0)
"""Ranks, as shares of the full one."""

Factors = tuple[Sequence[LowRank], Tensor]
"""A difference each, ``(stack, m, K)`` and so on, and their squared norms ``(T, stack)``."""


def of_matrices(differences: Sequence[Tensor]) -> Factors:
    """All singular directions."""
    parts = [truncated_svd(one, RankRule(1.0), svd="exact") for one in differences]
    return parts, torch.stack([one.double().square().sum(dim=(1, 2)) for one in differences])


def curves_of(factors: Factors, full: int | None = None) -> dict[str, list[float]]:
    """R as a share of the squares, I and I of the whole difference by pair, at `SHARES`.

    Args:
        factors: the differences.
        full: the full rank, if the factors are of fewer directions.
    """
    parts, energies = factors
    ranks = [max(1, int(share * (full or parts[0].rank))) for share in SHARES]
    pairs = pair_interferences(parts, ranks)
    held = torch.stack(
        [
            torch.stack([part.S[0, :rank].double().square().sum() for part in parts])
            for rank in ranks
        ]
    ) / energies.sum(dim=1)  # (ranks, T)
    roots = held.clamp(0, 1).sqrt()
    whole = pairs * (roots[:, None, :, None] * roots[:, None, None, :])
    most = len(parts) * (len(parts) - 1)
    found = {
        "R": reconstruction_errors(parts, energies, ranks) / energies.sum(),
        "I": interference(pairs) / most,
        "whole": interference(whole) / most,
    }
    return {
        curve: [round(value, 5) for value in values.tolist()] for curve, values in found.items()
    }


def in_common(differences: Sequence[Tensor]) -> dict[str, float]:
    """What centring takes off, and what it mixes in: I of all directions, four times.

    With ``P_t = D_t^T D_t / ||D_t||_F^2``, I of all directions is the sum of ``sqrt(tr P_i P_j)``.
    Around the average ``D_i`` becomes ``sum_j a_ij D_j``, with ``1 - 1/T`` for its own and ``-1/T``
    for the others. If the models' differences have nothing in common, ``D_j^T D_k = 0``, then
    ``P_i`` becomes a mean of all P, weighted by ``a_ij^2 ||D_j||_F^2``. Of equal norms that mean is
    the same for all but for the order, so that ``sum_i P_i`` stays, ``sum_i tr P_i^2`` falls (it is
    convex), and the sum over pairs of ``tr P_i P_j`` rises: **centring raises the interference of
    differences that have nothing in common**. It lowers that of a common part, which it takes off.

    Args:
        differences: from the base, ``(stack, m, n)``.

    Returns:
        The mean over pairs of models of the ``cosine`` of their differences, and of
        ``sqrt(tr P_i P_j)`` from the ``base``, around the ``average``, and ``mixed``: around the
        average, had they nothing in common.
    """
    deltas = torch.stack(list(differences))
    count = len(deltas)
    shares = torch.eye(count, dtype=torch.float64) - 1 / count
    energies = deltas.double().square().sum(dim=(1, 2, 3))
    mean = deltas.mean(dim=0)
    own = _row_products(deltas)
    weights = shares.square() * energies
    weights /= weights.sum(dim=1, keepdim=True)
    flat = deltas.flatten(1).double()
    cosines = (flat @ flat.mT) / (energies[:, None] * energies).sqrt()
    found = {
        "cosine": cosines,
        "base": own.clamp_min(0).sqrt(),
        "average": _row_products(deltas - mean).clamp_min(0).sqrt(),
        "mixed": (weights @ own @ weights.mT).clamp_min(0).sqrt(),
    }
    off = ~torch.eye(count, dtype=torch.bool)
    return {name: round(float(values[off].mean()), 5) for name, values in found.items()}


def _row_products(deltas: Tensor) -> Tensor:
    """``tr P_i P_j``, ``(T, T)``, of ``(T, stack, m, n)``."""
    count = len(deltas)
    found = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i, count):
            product = (deltas[i] @ deltas[j].mT).double().square().sum()
            found[i, j] = found[j, i] = product
    sizes = deltas.double().square().sum(dim=(1, 2, 3))
    return found / (sizes[:, None] * sizes)
