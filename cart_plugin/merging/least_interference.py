"""How truncated task vectors are combined from the weights alone, without a scale to tune.

CART adds ``lambda * sum_t D_t`` to the centre, for truncated centred task vectors ``D_t`` of one
weight. What that costs a task is the interference of the others on its own inputs: the loss of
merging is bounded through ``||(M - D_t) x||`` over the task's inputs ``x``, and the paper's theorem
goes on to bound that by how the subspaces of different tasks overlap (arXiv 2412.12153,
section 3). Here it is minimised instead.

The inputs of task t are not known, but they leave their trace: gradient descent moves a weight
only within the span of its inputs, so that ``D_t^T D_t`` stands for their covariance. (The centred
``D_t`` holds ``1/T`` of each other task's update, too; truncation drops most of that.) With
``C_t = D_t^T D_t / ||D_t||_2^2`` (every task's strongest input counts alike, however far the task
moved) the objective is ::

    L(M) = sum_t w_t tr((M - D_t) C_t (M - D_t)^T) + r ||M||_F^2 - 2 s <M, P>

and, being quadratic, has its minimum at ::

    M = (sum_t w_t D_t C_t + s P) (sum_t w_t C_t + r I)^-1

The first term decides where the tasks' inputs lie. Elsewhere the others do: for r = s, as by
default, they are ``r ||M - P||_F^2`` up to a constant, so that M is P where no inputs are known.
P is CART's own sum, scaled so that the tasks have their full strength in it ::

    P = sum_t w_t D_t / rho,    rho = ||sum_t w_t D_t||_F^2 / sum_t w_t ||D_t||_F^2

``rho`` is how much of the task vectors the sum keeps: ``<P, D_t>`` is ``||D_t||^2`` on the
(weighted) average of the tasks. Centred task vectors cancel, the more the more directions are kept
and the fewer the tasks are, which is why the best lambda of CART grows with the rank. Tasks of
equal weight whose row spaces are orthogonal do not interfere: ``rho`` is 1, and for r = s M is
``sum_t D_t`` at any r.

Kin: RegMean (arXiv 2212.09849) solves the first term's system with covariances of real activations;
WUDI (arXiv 2503.08099) runs gradient descent on a data-free objective of this kind; ACE-Merging
(adaptive covariance estimation) estimates the covariances from the task vectors, too. What was
tried besides, and what it brought: ``benchmarks/notes/auto.md``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.precision import full_precision
from cart_plugin.merging.normal_equations import System

RIDGE = 1.0
PULL = 1.0
AUTO_RANK_RATIO = 0.16


def least_interference(
    parts: Iterable[tuple[LowRank, float]],
    ridge: float = RIDGE,
    pull: float = PULL,
    *,
    rounding: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """The matrix that disturbs the tasks least on their own inputs; see the module.

    Solved as `cart_plugin.merging.normal_equations` does, by factors where that is smaller.

    Peak memory, the parts included, is below ``2 k (m + n) + 2 k^2 + 3 m n`` numbers, for k the
    smaller of K and n.

    Args:
        parts: a task's truncated task vector, ``(m, n)`` or a stack of such, and its weight, one
            pair after the other. The weights are positive.
        ridge: r, relative to the mean eigenvalue of ``sum_t w_t C_t``; above 0. Towards infinity,
            at a fixed `pull`, M goes to zero, that is, the merged weight to the centre.
        pull: s, relative to the same. At 0, M is zero where no task moved.
        rounding: for each part the squared norm of the rounding in all of its task vector,
            ``(stack,)``, or None for nothing: a sum that is nearly all rounding, because what is
            real in it cancels, is not scaled up.

    Returns:
        M, of the factors' dtype, ``(m, n)`` or a stack. Zero if all task vectors are.
    """
    total = System()
    if rounding is None:
        for factors, weight in parts:
            total.add(factors, weight)
    else:
        for (factors, weight), own in zip(parts, rounding, strict=True):
            total.add(factors, weight, rounding=own)
    return total.solve(ridge, pull)


def by_direction(
    parts: Sequence[tuple[LowRank, float]],
    ranks: Sequence[int] | None = None,
    rounding: Sequence[Tensor | None] | None = None,
) -> list[LowRank]:
    """The same matrix as a sum over tasks and singular directions, ``M = sum_t w_t Q_t``.

    Both right-hand sides of the system are sums over the directions ``u_i s_i v_i^T`` of tasks::

        Q_t = sum_i u_i s_i (s_i^2 / s_1^2 + s / rho) v_i^T (sum_t w_t C_t + r I)^-1

    Args:
        parts: as in `least_interference`; a weight of 0 leaves a task out of the sums.
        ranks: how many leading directions of each make M; the others are scaled in the same way,
            as what they would add to it. All if None.
        rounding: as in `least_interference`.

    Returns:
        ``Q_t`` for each task, as factors with as many directions as were given; the rows of ``Vh``
        are not orthogonal.
    """
    system, device = System(), parts[0][0].S.device
    ranks = [factors.rank for factors, _ in parts] if ranks is None else ranks
    noise = [None] * len(parts) if rounding is None else rounding
    for (factors, weight), rank, own in zip(parts, ranks, noise, strict=True):
        if weight:
            leading = LowRank(
                factors.U[..., :rank], factors.S[..., :rank], factors.Vh[..., :rank, :]
            )
            system.add(leading, weight, rounding=own)
    strength = system.strength(PULL)
    root = torch.linalg.cholesky(system.metric(RIDGE))
    found = []
    for factors, _ in parts:
        here = factors.to(root.device)
        shares = torch.where(here.S[..., :1] > 0, here.S / here.S[..., :1], 0)
        values = here.S * (shares.square() + strength[..., None])
        with full_precision(root.device):
            right = torch.cholesky_solve(here.Vh.mT, root).mT
        found.append(LowRank(here.U, values, right).to(device))
    return found
