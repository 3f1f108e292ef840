"""DOGE (arXiv 2501.01230) on matrices, step by step what FusionBench's does, and faster.

With ``lambda_t = lamda / ||tau_t||`` of each matrix, a vector delta is learned that is added to all
task vectors: by Adam, on ``sum_t ||r_t||^2`` for ``r_t``, by row, ``<tau_t, tau_t - sum_s lambda_s
(tau_s + delta)>``, its gradient kept out of the subspace that the tasks' leading left singular
vectors share. What is added to the base is ``sum_t lambda_t mask_t (tau_t + delta)``, where mask_t
has the largest entries of a task's vector, over all matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STEPS, RATE = 400, 1e-4  # of Adam


def doge(
    matrices: Sequence[Sequence[Tensor]],
    *,
    lamda: float = 0.07,
    subspace: float = 6,
    kept: float = 0.3,
) -> list[Tensor]:
    """Merge all matrices of some models.

    Args:
        matrices: of each, the task vectors, (m, n).
        lamda: scale of the normed task vectors; FusionBench's default, as the others.
        subspace: the shared one has ``min(m, n) / subspace`` directions.
        kept: share of the entries that are left of a task's vector.

    Returns:
        What is added to the base, by matrix.
    """
    thresholds = [
        _largest(torch.cat([taus[place].flatten() for taus in matrices]).abs(), kept)
        for place in range(len(matrices[0]))
    ]
    return [_merged(taus, thresholds, lamda, subspace) for taus in matrices]


def _largest(values: Tensor, share: float) -> Tensor:
    """The least of the largest values."""
    return values.kthvalue(len(values) - int(share * len(values))).values


def _merged(
    taus: Sequence[Tensor], thresholds: Sequence[Tensor], lamda: float, subspace: float
) -> Tensor:
    norms = torch.stack([torch.linalg.vector_norm(tau) for tau in taus])
    scales = torch.where(norms > 0, lamda / norms, 0.0)  # of what was not trained
    basis = _shared(taus, subspace)
    rows = torch.stack(list(taus), dim=1)
    delta = learned_delta(rows, scales, lambda slope: basis @ (basis.mT @ slope))
    parts = zip(taus, scales, thresholds, strict=True)
    masked = [scale * (tau + delta) * (tau.abs() >= least) for tau, scale, least in parts]
    return torch.stack(masked).sum(dim=0)


def _shared(taus: Sequence[Tensor], subspace: float) -> Tensor:
    """An orthonormal basis of what the tasks' leading left singular vectors have in common."""
    least = min(taus[0].shape)
    count = least // len(taus)
    leading = [torch.linalg.svd(tau, full_matrices=False).U[:, :count] for tau in taus]
    found = torch.linalg.svd(torch.cat(leading, dim=1), full_matrices=False).U
    return found[:, : int(least / subspace)]


@torch.no_grad()
def learned_delta(rows: Tensor, scales: Tensor, shared: Callable[[Tensor], Tensor]) -> Tensor:
    """What is added to all task vectors of a matrix.

    A step takes two products; FusionBench's makes as many passes for each task.

    Args:
        rows: of the task vectors, ``(m, T, n)``.
        scales: the lambda_t, ``(T,)``.
        shared: the part of a gradient (m, n) in the shared subspace, which is left out.

    Returns:
        The delta, (m, n).
    """
    own = rows.square().sum(dim=2) - (rows @ (scales @ rows)[..., None])[..., 0]
    delta = torch.nn.Parameter(torch.zeros_like(rows[:, 0]))
    optimizer = torch.optim.Adam([delta], lr=RATE)
    for _ in range(STEPS):
        left = own - scales.sum() * (rows @ delta[..., None])[..., 0]
        slope = -2 * scales.sum() * (left[:, None] @ rows)[:, 0]
        delta.grad = slope - shared(slope)
        optimizer.step()
    return delta.detach()
