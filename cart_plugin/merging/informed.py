"""How fine-tuned weights are combined where their base model is known, with nothing to tune.

As `cart_plugin.merging.least_interference` does, for task vectors ``tau_t = W_t - W_base`` of one
weight, it disturbs each task least on its own inputs, whose covariance the task vector stands for::

    L(M) = sum_t w_t tr((M - tau_t) C_t (M - tau_t)^T) + r ||M - P||_F^2

    M = (sum_t w_t tau_t C_t + r P) (sum_t w_t C_t + r I)^-1,    C_t = D_t^T D_t / ||D_t||_2^2

with ``D_t`` the truncated ``tau_t``; the merged weight is ``W_base + M``. What differs is where the
covariances come from. Training moves a weight only within the span of its inputs, and the task
vector holds what it moved. A centred task vector holds ``1/T`` of every other task's, too, and of
two models the two are opposite: they have one covariance, and their average is all that is left.

P decides where no task has inputs to go by. It is the mean of the task vectors, as strong as makes
it give back what they have in common at full strength::

    P = mean / kappa,    mean = sum_t w_t tau_t / sum_t w_t,
                         kappa = ||mean||_F^2 / (sum_t w_t ||tau_t||_F^2 / sum_t w_t)

``<P, tau_t>`` is then ``||tau_t||^2`` on the (weighted) average of the tasks. ``kappa`` is 1 for
equal task vectors, so that P is the model itself, and ``1/T`` for those of T tasks that have
nothing in common, so that P is their sum; further its strength does not go, since task vectors that
cancel leave rounding. P is not truncated: equal models give themselves.

Kin: RegMean (arXiv 2212.09849) has this first term with covariances of real activations; WUDI
(arXiv 2503.08099), SWUDI and ASWUDI filter the eigenvalues of ``sum C_t`` otherwise, with the sum
in the place of P. What was tried besides, and what it brought: ``benchmarks/notes/auto.md``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from cart_plugin.linalg.factors import LowRank
from cart_plugin.merging.normal_equations import System

RIDGE_AROUND_BASE = 0.3


class Task(NamedTuple):
    """What a model changed of one weight.

    Attributes:
        factors: of its truncated task vector, ``(m, n)`` or a stack of such.
        energy: squared Frobenius norm of the whole task vector, in fp64: a number, or one a matrix
            of the stack.
        weight: positive.
    """

    factors: LowRank
    energy: Tensor
    weight: float


def informed_by_base(
    tasks: Iterable[Task], mean: Tensor, ridge: float = RIDGE_AROUND_BASE
) -> Tensor:
    """What to add to the base model's weight; see the module.

    Peak memory, the factors included, is below ``2 k (m + n) + 2 k^2 + 4 m n`` numbers, for k the
    smaller of n and the sum of the ranks.

    Args:
        tasks: one after the other.
        mean: weighted mean of the whole task vectors, ``(m, n)`` or a stack of such. Used up.
        ridge: r, relative to the mean eigenvalue of ``sum_t w_t C_t``; above 0. Towards infinity, M
            goes to P.

    Returns:
        M, of the factors' dtype, ``(m, n)`` or a stack. Zero if all task vectors are.
    """
    if mean.device.type == "mps":  # no fp64, and not all of the linear algebra
        mean = mean.cpu()
    total = System(summed=False)
    energy = torch.zeros((), dtype=torch.float64, device=mean.device)
    weights = []
    for factors, of_task, weight in tasks:
        total.add(factors, weight)
        energy = energy + weight * of_task.to(mean.device)
        weights.append(weight)
    sum_ = sum(weights)
    common = energy_of(mean)
    most = sum_**2 / sum(weight**2 for weight in weights)
    strength = torch.where(common > 0, energy / sum_ / common, 1).clamp_max(most)
    target = mean.mul_(strength.to(mean.dtype)[..., None, None])
    return total.solve_towards(target, ridge)


def energy_of(matrices: Tensor) -> Tensor:
    """Squared Frobenius norms, in fp64: fp32 has no room for squares."""
    if matrices.device.type == "mps":
        matrices = matrices.cpu()
    return torch.linalg.vector_norm(matrices, dim=(-2, -1), dtype=torch.float64).square()
