"""How weights are combined that LoRA has changed, where their base model is known.

`cart_plugin.merging.informed` takes from ``tau_t = W_t - W_base`` where the inputs of task t lie.
That holds for weights that were trained as they are. LoRA draws A at random and trains B: the rows
of ``tau_t = B_t A_t`` are those of A_t, which meet every input. Two things follow, and are
different here (what each is worth on language models: ``benchmarks/notes/auto.md``):

- **What all tasks have in common is not a task's own.** Adapters that were trained from one start
  have the same rows, in which tasks show by what they differ. From each ``tau_t`` the part is
  taken off that the tasks share, estimated from the average ``m = sum_t p_t tau_t`` (p the weights,
  of sum 1) as Wiener's filter does::

      tau'_t = tau_t - m G,    G = (m^T m)^+ X

  with X the mean of ``tau_s^T tau_t`` over pairs of different tasks, and the eigenvalues of G, the
  share of m that is common, limited to 0 to 1. Tasks with nothing in common keep their ``tau_t``;
  of equal ones nothing is left.
- **Inputs that the others changed are each task's inputs, too,** the more the weaker it is itself::

      C_t = (tau'_t^T tau'_t + T m^T m) / trace

  T is the number of tasks (with weights ``1 / sum p^2``): for tasks with nothing in common, both
  terms are of like size.

The system is the same as there, with ``D_t = W_t - average``, and in the pull the part of D_t that
acts on the rows of ``tau'_t``. All is done in orthonormal bases of the factors, on matrices of the
sum of the ranks.

**Of more than four models** the average takes the base's place, as it does for whole models of that
number: the ``tau_t`` are the differences from it, in which nothing is common and nothing is lacking
besides, and the mean of the ``tau_s^T tau_s``, ``T / 4`` times, takes the place of ``T m^T m``: the
rows of all others say more of a task's inputs then than its own. A sum of what each lacks on its
own rows, as above, is more and more draw (``benchmarks/notes/auto.md``). The base is of use only to
tell what made the changes; without it the differences from one of the models do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.gram import eigh
from cart_plugin.linalg.precision import full_precision
from cart_plugin.linalg.rounding import is_drowned, rounding_left

_ROUNDING = 1e-8  # a share of squares below which they are none
_LEFT_OUT = 1e-3
_MARGIN = 1.1  # of what rounding is expected to be: it is an estimate
FEW_TASKS = 4
"""Of more, the average takes the base's place."""


def is_low_rank(
    values: Tensor, energy: Tensor, rounding: Tensor, shape: tuple[int, int]
) -> bool | None:
    """Whether a few directions hold all of what a model has changed of a weight, but for rounding.

    A quarter of the directions of what full fine-tuning changes lacks 0.3 % and more (the image
    suite's encoders).

    Args:
        values: leading singular values, as many as are few, ``(stack, k)``.
        energy: squared Frobenius norms, ``(stack,)``, in fp64.
        rounding: what of them to expect of rounding, as `rounding_energy` has it.
        shape: (m, n).

    Returns:
        None where that cannot be told, because nothing was changed or rounding is most of it.
    """
    drowned = is_drowned(energy, rounding) | (energy == 0)
    lost = energy - values.double().square().sum(dim=-1)
    allowed = _LEFT_OUT * energy + _MARGIN * rounding_left(values, rounding, *shape)
    if bool(((lost > allowed) & ~drowned).any()):
        return False
    return None if bool(drowned.all()) else True


class Solution(NamedTuple):
    """What to add to the average, and the metric of the objective; in coordinates.

    Attributes:
        added: M, ``(stack, p, q)``.
        metric: ``sum w C + r I``, ``(stack, q, q)``.
        strength: ``s / rho``, ``(stack,)``.
    """

    added: Tensor
    metric: Tensor
    strength: Tensor


def combine(
    tasks: Sequence[Tensor],
    weights: Sequence[float],
    inputs: int,
    *,
    ridge: float,
    least_kept: float,
    least_share: float,
    centred: bool = False,
) -> Solution:
    """Solve the system for differences in coordinates.

    Args:
        tasks: ``tau_t`` in common orthonormal bases, ``(stack, p, q)`` in fp64.
        weights: w, one a task; positive.
        inputs: n, of the weight itself.
        ridge: r and s, relative to the mean eigenvalue of the directions that are known.
        least_kept: the least rho.
        least_share: of the largest singular value of a ``tau'_t``: below, a direction is rounding.
        centred: the average takes the base's place. The differences may be from anything that all
            tasks have in common.
    """
    with full_precision(tasks[0].device):
        return _System(tasks, weights, least_share, centred).solve(inputs, ridge, least_kept)


class _System:
    """The sums of the system, in coordinates; see `combine`."""

    def __init__(
        self, tasks: Sequence[Tensor], weights: Sequence[float], least_share: float, centred: bool
    ) -> None:
        taus = torch.stack(list(tasks))  # (T, stack, p, q)
        shares = taus.new_tensor(weights) / sum(weights)
        average = torch.einsum("t,tspq->spq", shares, taus)
        if centred:
            taus = own = taus - average
            others = torch.einsum("t,tspq,tspr->sqr", shares, taus, taus)
            others *= (1 / (FEW_TASKS * shares.square().sum())).clamp_min(1)
            average = torch.zeros_like(average)
        else:
            own = taus - average @ _common(taus, shares, average)
            others = average.mT @ average / shares.square().sum()
        squares, vectors = eigh(own.mT @ own)
        sizes = taus.square().sum(dim=(-2, -1))  # (T, stack)
        least = torch.maximum(least_share**2 * squares[..., -1], _ROUNDING * sizes)
        self.taus, self.average, self.others, self.vectors = taus, average, others, vectors
        self.squares = torch.where(squares > least[..., None], squares, 0)
        self.weights = weights
        # A task that changed nothing has no inputs, neither its own nor those of the others.
        self.heavy = torch.where(sizes > 0, taus.new_tensor(weights)[:, None], 0)

    def covariance(self, task: int, weight: Tensor) -> Tensor:
        """Of a task, times a weight, ``(stack, q, q)``."""
        columns = self.vectors[task]
        found = (columns * self.squares[task][..., None, :]) @ columns.mT + self.others
        trace = found.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        found *= (weight / torch.where(trace > 0, trace, 1))[..., None, None]
        return found

    def acting(self, task: int, rows: Tensor, real: Tensor) -> Tensor:
        """The part of rows that acts on a task's own ones, of those that are real."""
        columns = self.vectors[task]
        return ((rows @ columns) * real[..., None, :]) @ columns.mT

    def solve(self, inputs: int, ridge: float, least_kept: float) -> Solution:
        known = torch.zeros(self.taus.shape[1], device=self.taus.device)
        fitted, summed = torch.zeros_like(self.average), torch.zeros_like(self.average)
        gram, energy = torch.zeros_like(self.others), torch.zeros_like(known, dtype=torch.float64)
        for task, (tau, weight) in enumerate(zip(self.taus, self.heavy, strict=True)):
            real = (self.squares[task] > 0) & (weight > 0)[..., None]
            known = known + real.sum(dim=-1)
            covariance = self.covariance(task, weight)
            lacking = tau - self.average
            acting = self.acting(task, lacking, real)
            gram += covariance
            fitted += lacking @ covariance
            summed += weight[..., None, None] * acting
            energy += weight * acting.square().sum(dim=(-2, -1))
        total = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        shift = ridge * torch.where(total > 0, total, 1) / known.clamp(1, inputs)
        kept = summed.square().sum(dim=(-2, -1)) / torch.where(energy > 0, energy, 1)
        mean_weight = sum(self.weights) / len(self.weights)
        strength = shift / kept.clamp_min(least_kept * mean_weight)
        gram.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
        right = fitted + strength[..., None, None] * summed
        return Solution(torch.linalg.solve(gram, right, left=False), gram, strength)


def _common(taus: Tensor, shares: Tensor, average: Tensor) -> Tensor:
    """G, ``(stack, q, q)``: what of the average's answer to an input the tasks have in common."""
    square = average.mT @ average
    own = torch.einsum("t,tspq,tspr->sqr", shares.square(), taus, taus)
    across = (square - own) / (1 - shares.square().sum()).clamp_min(torch.finfo(taus.dtype).eps)
    values, vectors = eigh(square)
    known = values > _ROUNDING * values[..., -1:].clamp_min(torch.finfo(taus.dtype).tiny)
    roots = torch.where(known, values, 1).sqrt()
    inverse = vectors * torch.where(known, 1 / roots, 0)[..., None, :]
    root = vectors * torch.where(known, roots, 0)[..., None, :]
    parts, turned = eigh(inverse.mT @ across @ inverse)
    return (inverse @ turned * parts.clamp(0, 1)[..., None, :]) @ (root @ turned).mT


def combine_factors(
    parts: Sequence[tuple[LowRank, float]], inputs: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """`combine` for factors of weights, in bases of theirs.

    Args:
        parts: of ``tau_t``, ``(stack, m, n)``, and its weight.
        inputs: n.
        options: those of `combine`.

    Returns:
        What to add to the average, as ``left @ right``: ``(stack, m, p)`` and ``(stack, p, n)``.
    """
    with full_precision(parts[0][0].S.device):
        left, taus, right = _in_coordinates([one for one, _ in parts])
        found = combine(taus, [weight for _, weight in parts], inputs, **options)
        return left @ found.added.to(left.dtype), right.mT


def by_direction(
    parts: Sequence[tuple[LowRank, float]],
    inputs: int,
    *,
    ridge: float,
    least_kept: float,
    least_share: float,
    centred: bool = False,
) -> list[LowRank]:
    """What is added to the average, as a sum over tasks and singular directions.

    The right-hand sides of the system are sums over the directions ``u_i s_i v_i^T`` of tasks'
    differences from the average, so that ``M = sum_t w_t Q_t`` for ::

        Q_t = sum_i u_i s_i v_i^T (C_t + s / rho A_t) (sum_t w_t C_t + r I)^-1

    with A_t the projection to the rows of ``tau'_t``.

    Args:
        parts: of ``tau_t``, ``(stack, m, n)``, and its weight, positive, of mean 1.
        inputs: n.
        ridge: as in `combine`.
        least_kept: as there.
        least_share: as there.
        centred: as there.

    Returns:
        ``Q_t`` for each task, as factors; the rows of ``Vh`` are not orthogonal.
    """
    with full_precision(parts[0][0].S.device):
        left, taus, right = _in_coordinates([one for one, _ in parts])
        system = _System(taus, [weight for _, weight in parts], least_share, centred)
        solved = system.solve(inputs, ridge, least_kept)
        found = []
        for task, tau in enumerate(system.taus):
            u, s, vh = torch.linalg.svd(tau - system.average, full_matrices=False)
            known = s.square() > _ROUNDING * s.square().sum(dim=-1, keepdim=True)
            known &= (system.heavy[task] > 0)[..., None]  # one that changed nothing has no part
            count = max(1, int(known.flatten(end_dim=-2).sum(dim=-1).max()))
            s = torch.where(known, s, 0)[..., :count]
            u, vh = u[..., :count], vh[..., :count, :]
            rows = vh @ system.covariance(task, torch.ones_like(solved.strength))
            acting = system.acting(task, vh, system.squares[task] > 0)
            rows += solved.strength[..., None, None] * acting
            rows = torch.linalg.solve(solved.metric, rows, left=False)
            dtype = left.dtype
            found.append(LowRank(left @ u.to(dtype), s.to(dtype), rows.to(dtype) @ right.mT))
        return found


def _in_coordinates(tasks: Sequence[LowRank]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Orthonormal bases of the columns and rows, and in them the tasks, in fp64."""
    left = torch.linalg.qr(torch.cat([one.U for one in tasks], dim=-1))[0]
    right = torch.linalg.qr(torch.cat([one.Vh.mT for one in tasks], dim=-1))[0]
    taus = [
        ((left.mT @ one.U) * one.S[..., None, :]).double() @ (one.Vh @ right).double()
        for one in tasks
    ]
    return left, taus, right
