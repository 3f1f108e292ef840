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

from collections.abc import Iterable, Iterator, Sequence
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
    tasks: Sequence[LowRank],
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
        tasks: ``tau_t`` in common orthonormal bases, ``(stack, p, q)`` in fp64; as factors, which
            of many tasks take next to nothing beside the matrices.
        weights: w, one a task; positive.
        inputs: n, of the weight itself.
        ridge: r and s, relative to the mean eigenvalue of the directions that are known.
        least_kept: the least rho.
        least_share: of the largest singular value of a ``tau'_t``: below, a direction is rounding.
        centred: the average takes the base's place. The differences may be from anything that all
            tasks have in common.
    """
    with full_precision(tasks[0].S.device):
        return _System(tasks, weights, least_share, centred).solve(inputs, ridge, least_kept)


class _Task(NamedTuple):
    """One task of a `_System`, in coordinates.

    Attributes:
        tau: tau_t, ``(stack, p, q)``.
        vectors: eigenvectors of ``tau'_t^T tau'_t``, ``(stack, q, q)``.
        squares: its eigenvalues, ``(stack, q)``; 0 for what is rounding.
        weight: w, ``(stack,)``; 0 where nothing was changed.
        others: the inputs that the others changed, ``(stack, q, q)``.
    """

    tau: Tensor
    vectors: Tensor
    squares: Tensor
    weight: Tensor
    others: Tensor

    def covariance(self, weight: Tensor) -> Tensor:
        """C_t times a weight, ``(stack, q, q)``."""
        found = (self.vectors * self.squares[..., None, :]) @ self.vectors.mT + self.others
        trace = found.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        found *= (weight / torch.where(trace > 0, trace, 1))[..., None, None]
        return found

    def acting(self, rows: Tensor, real: Tensor) -> Tensor:
        """The part of rows that acts on the task's own ones, of those that are real."""
        return ((rows @ self.vectors) * real[..., None, :]) @ self.vectors.mT


class _System:
    """The sums of the system, in coordinates; see `combine`.

    One task's matrices exist at a time: of many adapters they would take more than the weights.
    """

    def __init__(
        self, tasks: Sequence[LowRank], weights: Sequence[float], least_share: float, centred: bool
    ) -> None:
        self.tasks, self.weights, self.least_share = tasks, weights, least_share
        shares = [weight / sum(weights) for weight in weights]
        squared = sum(share**2 for share in shares)
        mean = _weighted(shares, (task.dense() for task in tasks))
        self.centre: Tensor | None = mean if centred else None
        self.average = torch.zeros_like(mean) if centred else mean
        self.common: Tensor | None = None
        if centred:
            self.others = _weighted(shares, (tau.mT @ tau for tau in map(self._tau, tasks)))
            self.others *= max(1.0, 1 / (FEW_TASKS * squared))
        else:
            self.common = _common(tasks, shares, mean)
            self.others = mean.mT @ mean / squared

    def _tau(self, task: LowRank) -> Tensor:
        return task.dense() if self.centre is None else task.dense() - self.centre

    def __iter__(self) -> Iterator[_Task]:
        """The tasks, each made when it is due."""
        for task, weight in zip(self.tasks, self.weights, strict=True):
            tau = self._tau(task)
            own = tau if self.common is None else tau - self.average @ self.common
            squares, vectors = eigh(own.mT @ own)
            size = tau.square().sum(dim=(-2, -1))
            least = torch.maximum(self.least_share**2 * squares[..., -1], _ROUNDING * size)
            squares = torch.where(squares > least[..., None], squares, 0)
            # A task that changed nothing has no inputs, neither its own nor those of the others.
            yield _Task(tau, vectors, squares, (size > 0).to(size) * weight, self.others)

    def solve(self, inputs: int, ridge: float, least_kept: float) -> Solution:
        fitted, summed = torch.zeros_like(self.average), torch.zeros_like(self.average)
        gram = torch.zeros_like(self.others)
        known = torch.zeros_like(gram[..., 0, 0])
        energy = torch.zeros_like(known, dtype=torch.float64)
        for task in self:
            real = (task.squares > 0) & (task.weight > 0)[..., None]
            known = known + real.sum(dim=-1)
            covariance = task.covariance(task.weight)
            lacking = task.tau - self.average
            acting = task.acting(lacking, real)
            gram += covariance
            fitted += lacking @ covariance
            summed += task.weight[..., None, None] * acting
            energy += task.weight * acting.square().sum(dim=(-2, -1))
        total = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        shift = ridge * torch.where(total > 0, total, 1) / known.clamp(1, inputs)
        kept = summed.square().sum(dim=(-2, -1)) / torch.where(energy > 0, energy, 1)
        mean_weight = sum(self.weights) / len(self.weights)
        strength = shift / kept.clamp_min(least_kept * mean_weight)
        gram.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
        right = fitted + strength[..., None, None] * summed
        return Solution(torch.linalg.solve(gram, right, left=False), gram, strength)


def _weighted(shares: Sequence[float], terms: Iterable[Tensor]) -> Tensor:
    """The weighted sum, one term at a time."""
    total: Tensor | None = None
    for share, term in zip(shares, terms, strict=True):
        total = share * term if total is None else total.add_(term, alpha=share)
    assert total is not None
    return total


def _common(tasks: Sequence[LowRank], shares: Sequence[float], average: Tensor) -> Tensor:
    """G, ``(stack, q, q)``: what of the average's answer to an input the tasks have in common."""
    info = torch.finfo(average.dtype)
    squared = [share**2 for share in shares]
    square = average.mT @ average
    own = _weighted(squared, (tau.mT @ tau for tau in (task.dense() for task in tasks)))
    across = (square - own) / max(1 - sum(squared), info.eps)
    values, vectors = eigh(square)
    known = values > _ROUNDING * values[..., -1:].clamp_min(info.tiny)
    roots = torch.where(known, values, 1).sqrt()
    inverse = vectors * torch.where(known, 1 / roots, 0)[..., None, :]
    root = vectors * torch.where(known, roots, 0)[..., None, :]
    parts, turned = eigh(inverse.mT @ across @ inverse)
    return (inverse @ turned * parts.clamp(0, 1)[..., None, :]) @ (root @ turned).mT


def combine_factors(parts: Sequence[tuple[LowRank, float]], inputs: int, **options: Any) -> Tensor:
    """`combine` for factors of weights, in bases of theirs.

    Peak memory is below ``4 K (m + n) + 40 K^2 + 3 m n`` numbers in fp32, for K the smaller of n
    and the sum of the ranks.

    Args:
        parts: of ``tau_t``, ``(stack, m, n)``, and its weight.
        inputs: n.
        options: those of `combine`.

    Returns:
        What to add to the average, ``(stack, m, n)``.
    """
    with full_precision(parts[0][0].S.device):
        left, taus, right = _in_coordinates([one for one, _ in parts])
        found = combine(taus, [weight for _, weight in parts], inputs, **options)
        return left @ found.added.to(left.dtype) @ right.mT


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
        for task in system:
            u, s, vh = torch.linalg.svd(task.tau - system.average, full_matrices=False)
            known = s.square() > _ROUNDING * s.square().sum(dim=-1, keepdim=True)
            known &= (task.weight > 0)[..., None]  # one that changed nothing has no part
            count = max(1, int(known.flatten(end_dim=-2).sum(dim=-1).max()))
            s = torch.where(known, s, 0)[..., :count]
            u, vh = u[..., :count], vh[..., :count, :]
            rows = vh @ task.covariance(torch.ones_like(solved.strength))
            acting = task.acting(vh, task.squares > 0)
            rows += solved.strength[..., None, None] * acting
            rows = torch.linalg.solve(solved.metric, rows, left=False)
            dtype = left.dtype
            found.append(LowRank(left @ u.to(dtype), s.to(dtype), rows.to(dtype) @ right.mT))
        return found


def _in_coordinates(tasks: Sequence[LowRank]) -> tuple[Tensor, list[LowRank], Tensor]:
    """Orthonormal bases of the columns and rows, and in them the tasks, in fp64."""
    left = torch.linalg.qr(torch.cat([one.U for one in tasks], dim=-1))[0]
    right = torch.linalg.qr(torch.cat([one.Vh.mT for one in tasks], dim=-1))[0]
    taus = [LowRank(left.mT @ one.U, one.S, one.Vh @ right).double() for one in tasks]
    return left, taus, right
