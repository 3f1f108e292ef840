"""Data-free merging methods of 2025 and 2026 that merge task vectors, as functions of one weight.

Each takes the task vectors ``tau_t = W_t - W_base`` of one weight, matrices (m, n) of T tasks that
map n inputs to m outputs, and gives the merged task vector (m, n), which is added to the base; all
in fp32. They are written from the papers' formulas, without a line of the authors' code, and have
the authors' defaults; where a paper leaves something open, the docstring says what was taken.

What was not trained (a task vector of zeros) is left out: most formulas divide by its norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

REVISION = 1  # raised when a method gives other weights


def aswudi(taus: Sequence[Tensor]) -> Tensor:
    """ASWUDI (arXiv 2606.07289, which also says SWUDI-A): WUDI's optimum in the leading directions.

    WUDI minimises ``sum_t ||(M - tau_t) tau_t'||^2 / ||tau_t||^2``. With ``C = sum_t tau_t'tau_t /
    ||tau_t||^2 = Q diag(l) Q'``, ``D = sum_t tau_t tau_t'tau_t / ||tau_t||^2`` and ``theta = sum_t
    tau_t`` it is

        ``M = theta + (D - theta C) Q diag(h / l) Q'``

    where h is 1 for the ``ceil((sum sqrt l)^2 / sum l)`` leading eigenvectors of C, and 0 for the
    others, along which M is the sum. Nothing is set by hand.

    Args:
        taus: task vectors, (m, n) each.

    Returns:
        The merged task vector, (m, n).
    """

    def leading(values: Tensor) -> Tensor:
        count = math.ceil(float(values.sqrt().sum().square() / values.sum()))
        return (torch.arange(len(values), device=values.device) < count).float()

    return _filtered(taus, leading)


def swudi(taus: Sequence[Tensor], *, time: float = 300.0, rank_ratio: float = 0.65) -> Tensor:
    """SWUDI (arXiv 2606.07289): as `aswudi`, with ``h = 1 - exp(-time l)`` up to a fixed rank.

    That is gradient descent on WUDI's loss, stopped early, without the directions of the smallest
    eigenvalues.

    Args:
        taus: task vectors, (m, n) each.
        time: of the descent. The paper's 300; the authors tune it by model, up to 1800 for CLIP.
        rank_ratio: share of the n eigenvectors that are kept. The paper's for CLIP; 0.85 for Llama.

    Returns:
        The merged task vector, (m, n).
    """

    def early(values: Tensor) -> Tensor:
        kept = torch.arange(len(values), device=values.device) < rank_ratio * len(values)
        return -torch.expm1(-time * values) * kept

    return _filtered(taus, early)


def _filtered(taus: Sequence[Tensor], keep: Callable[[Tensor], Tensor]) -> Tensor:
    """``theta + (D - theta C) Q diag(h / l) Q'`` with ``h = keep(l)``, l in descending order."""
    trained = _trained(taus)
    if not trained:
        return torch.zeros_like(taus[0], dtype=torch.float32)
    theta = _total(trained)
    grams = [tau.mT @ tau / tau.square().sum() for tau in trained]
    gram = _total(grams)
    gap = _total([tau @ own for tau, own in zip(trained, grams, strict=True)]) - theta @ gram
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    # What rounding leaves of eigenvalues that are zero would count, too, and be divided by.
    rounding = len(values) * torch.finfo(values.dtype).eps * values[0]
    values = torch.where(values > rounding, values, 0.0)
    inverse = torch.where(values > 0, 1 / values, 0.0)
    return theta + (gap @ vectors * (keep(values) * inverse)) @ vectors.mT


def ace(
    taus: Sequence[Tensor],
    *,
    eps: float = 1e-5,
    threshold: float = 0.3,
    rank_ratio: float = 0.3,
) -> Tensor:
    """ACE-Merging (arXiv 2603.02945, v2): RegMean with the covariance of each task vector's rows.

    ``R_t`` is tau_t minus its mean row, ``S_t = R_t'R_t``, and tasks are uneven if ``g = Var_t(log
    e_t) / Mean_t(log e_t)^2`` with ``e_t = ||tau_t||^2`` is above the threshold; then ``S_t`` and
    eps are divided by ``tr S_t``. With ``A_t = S_t + eps I`` and a matrix P whose rows are all the
    mean row of ``sum_t S_t`` (over ``Mean_t(e_t)`` where tasks are uneven),

        ``M = (sum_t R_t A_t) (sum_t A_t + P)^-1``.

    Where tasks are uneven, the k leading singular directions of ``M + sum_t tau_t (S_t -
    Mean_t(A_t))`` are added, all with the mean of their singular values.

    As published, the method keeps no task's mean row, and g is not free of scale: tasks are uneven,
    however alike, where their ``e_t`` are about 1.

    Args:
        taus: task vectors, (m, n) each.
        eps: set by the authors for each family of models: 1e-5, but 2e-4 for RoBERTa-base and 4e-2
            for GPT-2.
        threshold: of g. The paper's 0.3. The variance is taken over T, not T - 1.
        rank_ratio: ``k / min(m, n)``, the paper's 0.3.

    Returns:
        The merged task vector, (m, n).
    """
    # Equal rows have no covariance.
    trained = [tau for tau in _trained(taus) if (tau != tau[0]).any()]
    if not trained:
        return torch.zeros_like(taus[0], dtype=torch.float32)
    rows = [tau - tau.mean(dim=0) for tau in trained]
    covariances = [row.mT @ row for row in rows]
    energies = torch.stack([tau.square().sum() for tau in trained])
    logs = energies.log()
    # Not a quotient: the mean may be 0.
    uneven = bool(logs.var(correction=0) > threshold * logs.mean().square())
    ridges = torch.full_like(energies, eps)
    if uneven:
        traces = [own.trace() for own in covariances]
        covariances = [own / trace for own, trace in zip(covariances, traces, strict=True)]
        ridges = ridges / torch.stack(traces)
    identity = torch.eye(trained[0].shape[1], device=energies.device)
    regular = [own + ridge * identity for own, ridge in zip(covariances, ridges, strict=True)]
    prior = _total(covariances).mean(dim=0)
    if uneven:
        prior = prior / energies.mean()
    right = _total([row @ own for row, own in zip(rows, regular, strict=True)])
    merged = torch.linalg.solve(_total(regular) + prior, right, left=False)
    if not uneven:
        return merged
    mean = _total(regular) / len(regular)
    residual = _total([tau @ (own - mean) for tau, own in zip(trained, covariances, strict=True)])
    left, values, right = torch.linalg.svd(merged + residual, full_matrices=False)
    count = max(1, int(rank_ratio * len(values)))
    return merged + values[:count].mean() * (left[:, :count] @ right[:count])


def dc_merge(
    taus: Sequence[Tensor],
    *,
    rank: int | None = None,
    density: float = 1e-3,
    smoothing: float | None = None,
) -> Tensor:
    """DC-Merge (arXiv 2603.06242): merging in a basis that holds every task's leading directions.

    The k leading left singular vectors of all tasks side by side, made orthonormal (their polar
    factor), are U, the right ones V, as in TSV-M. Of every core ``U' tau_t V``, tau_t cut to rank
    k, the largest entries are kept; an entry's sign is that of the sum over tasks, its value the
    mean of the cores that have that sign (as in TIES); only the T blocks of k x k on the diagonal
    count. The result goes back by U and V'.

    Args:
        taus: task vectors, (m, n) each.
        rank: k. None is ``floor(min(m, n) / T)``, the authors' choice for fully tuned models and
            the most that fits; for adapters they take the adapters' rank.
        density: share of the entries that is kept of each core, one at least. 1e-3 in the authors'
            released settings.
        smoothing: None, as the authors have it for fully tuned models, keeps singular values. A
            number replaces them, before all else, by values of the same sum that fall linearly to
            the last; the first is that many times the last, but never more times than it was. For
            adapters the authors take 5, or 1: all the same.

    Returns:
        The merged task vector, (m, n), which the authors scale by a factor tuned between 0.1 and 3.
    """
    trained = _trained(taus)
    if not trained:
        return torch.zeros_like(taus[0], dtype=torch.float32)
    most = max(1, min(trained[0].shape) // len(trained))
    count = most if rank is None else min(rank, most)
    parts = [torch.linalg.svd(tau, full_matrices=False) for tau in trained]
    lefts = [left[:, :count] for left, _, _ in parts]
    rights = [right[:count] for _, _, right in parts]
    values = [_smoothed(value[:count], smoothing) for _, value, _ in parts]
    left = polar(torch.cat(lefts, dim=1))
    right = polar(torch.cat(rights, dim=0))
    cores = torch.stack(
        [
            (left.mT @ own * value) @ (other @ right.mT)
            for own, value, other in zip(lefts, values, rights, strict=True)
        ]
    )
    merged = elected(largest(cores, density))
    blocks = torch.block_diag(*[torch.ones(count, count, device=merged.device)] * len(trained))
    return left @ (merged * blocks) @ right


def _smoothed(values: Tensor, most: float | None) -> Tensor:
    """Singular values that fall linearly, from at most so many times the last."""
    if most is None:
        return values
    ratio = min(most, float(values[0] / values[-1]))  # infinite if the last is zero
    line = torch.linspace(ratio, 1.0, len(values), device=values.device)
    return values.sum() * line / line.sum()


def largest(cores: Tensor, density: float) -> Tensor:
    """The cores (T, r, r) without their smaller entries."""
    flat = cores.abs().flatten(1)
    count = max(1, int(density * flat.shape[1]))
    least = flat.topk(count, dim=1).values[:, -1]
    return cores * (cores.abs() >= least[:, None, None])


def elected(cores: Tensor) -> Tensor:
    """By entry, the mean of those that have their sum's sign."""
    agree = (cores.sign() == cores.sum(dim=0).sign()) & (cores != 0)
    return (cores * agree).sum(dim=0) / agree.sum(dim=0).clamp_min(1)


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, or rows."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def svc(merged: Tensor, taus: Sequence[Tensor], a: float | None = None) -> Tensor:
    """Singular value calibration (arXiv 2602.05536) of what any method has merged.

    ``M = sum_r s_r u_r v_r'``. How much of task t's response along ``u_r`` is in the merged one is
    ``p_rt = <u_r'M, u_r'tau_t> / ||u_r'tau_t||^2``; s_r is divided by ``Mean_t max(p_rt, a)``: what
    several tasks have added up to is scaled down, what has cancelled is scaled up.

    Args:
        merged: a merged task vector, (m, n).
        taus: the task vectors, (m, n) each.
        a: limits how far values are raised: to ``1 / a`` times at most. None is the authors' ``1 /
            T``; after TSV-M they take 1, so that values fall only.

    Returns:
        The merged task vector with other singular values, (m, n).
    """
    least = 1 / len(taus) if a is None else a
    left, values, right = torch.linalg.svd(merged.float(), full_matrices=False)
    own = left.mT @ torch.stack([tau.float() for tau in taus])  # (T, r, n)
    inner = (own * (values[:, None] * right)).sum(dim=-1)
    squares = own.square().sum(dim=-1)
    share = torch.where(squares > 0, inner / squares, 0.0)  # a task without any response
    return (left * (values / share.clamp_min(least).mean(dim=0))) @ right


def _trained(taus: Sequence[Tensor]) -> list[Tensor]:
    return [tau.float() for tau in taus if tau.any()]


def _total(matrices: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(matrices)).sum(dim=0)
