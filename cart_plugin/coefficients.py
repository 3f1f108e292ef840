"""How truncated task vectors are combined from the weights alone, without a scale to tune.

CART adds ``lambda * sum_t D_t`` to the centre, for truncated centred task vectors ``D_t`` of one
weight. What that costs a task is the interference of the others on its own inputs. The paper bounds
it (arXiv 2412.12153, section 3: the loss of merging is at most a sum over tasks of
``||(M - D_t) x||`` over the task's inputs ``x``); here it is minimised instead.

The inputs of task t are not known, but they leave their trace: gradient descent moves a weight
only within the span of its inputs, so that ``D_t^T D_t`` stands for their covariance. With
``C_t = D_t^T D_t / ||D_t||_F^2`` (every task counts alike, however far it moved) the objective
is ::

    L(M) = sum_t w_t tr((M - D_t) C_t (M - D_t)^T) + r ||M||_F^2

It is quadratic, and its minimum ::

    M = (sum_t w_t D_t C_t) (sum_t w_t C_t + r I)^-1

The ridge ``r`` pulls towards the centre where no task has moved. It is given relative to the mean
eigenvalue of ``sum_t w_t C_t``, which is ``sum_t w_t / n``.

Kin: RegMean (arXiv 2212.09849) solves the same system with covariances of real activations; WUDI
(arXiv 2503.08099) runs gradient descent on a data-free objective of this kind; ACE-Merging
estimates the covariances from the task vectors, too.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cart_plugin.lowrank import LowRank
from cart_plugin.precision import full_precision

RIDGE = 0.1
AUTO_RANK_RATIO = 0.16


def least_interference(parts: Iterable[tuple[LowRank, float]], ridge: float = RIDGE) -> Tensor:
    """The matrix that disturbs the tasks least on their own inputs; see the module.

    With ``C_t = V S^2 V^T / ||S||^2`` the factors side by side, ``A = [U S^2 / ||S||]`` (m, K) and
    ``B = [V S / ||S||]`` (n, K), make it ``M = A B^T (B B^T + r I)^-1``, or, by the push-through
    identity, ``A (B^T B + r I)^-1 B^T``: a system of K = sum of ranks unknowns, taken while that is
    smaller than n. Beyond, only the (m, n) and (n, n) sums are kept, for any number of tasks.

    Both are well conditioned: the largest eigenvalue is at most ``sum_t w_t``, the smallest at
    least ``ridge / n`` of it.

    Args:
        parts: a task's truncated task vector, ``(m, n)`` or a stack of such, and its weight, one
            pair after the other. The weights are positive.
        ridge: relative to the mean eigenvalue; above 0.

    Returns:
        M, of the factors' dtype, ``(m, n)`` or a stack. Zero if all task vectors are.
    """
    total = _System()
    for factors, weight in parts:
        total.add(factors, weight)
    return total.solve(ridge)


class _System:
    """The sums of the normal equations: as factors, or dense once that is smaller."""

    def __init__(self) -> None:
        self.left: list[Tensor] = []
        self.right: list[Tensor] = []
        self.dense: tuple[Tensor, Tensor] | None = None
        self.trace: Tensor | float = 0.0
        self.shape: tuple[int, ...] = ()

    def add(self, factors: LowRank, weight: float) -> None:
        """Add a task's terms ``w D C`` and ``w C``."""
        self.shape = (*factors.U.shape[:-1], factors.Vh.shape[-1])
        norm = torch.linalg.vector_norm(factors.S, dim=-1, keepdim=True)
        # The task vectors of a weight that a task did not change are zero, and count nothing.
        shares = torch.where(norm > 0, factors.S / norm, 0)
        self.trace = self.trace + weight * shares.square().sum(dim=-1)
        right = factors.Vh.mT * (weight**0.5 * shares)[..., None, :]
        left = factors.U * (weight**0.5 * shares * factors.S)[..., None, :]
        with full_precision(left.device):
            if self.dense is not None:
                _add_product_(self.dense[0], left, right)
                _add_product_(self.dense[1], right, right)
                return
            self.left.append(left)
            self.right.append(right)
            if sum(part.shape[-1] for part in self.right) >= self.shape[-1]:
                a, b = torch.cat(self.left, dim=-1), torch.cat(self.right, dim=-1)
                self.dense = a @ b.mT, b @ b.mT
                self.left, self.right = [], []

    def solve(self, ridge: float) -> Tensor:
        """``A B^T (B B^T + r I)^-1``."""
        # Where nothing moved, any ridge will do.
        trace = torch.as_tensor(self.trace)
        shift = ridge * torch.where(trace > 0, trace, 1) / self.shape[-1]
        if self.dense is not None:
            product, gram = self.dense
            with full_precision(gram.device):
                return _solve(gram, shift, product.mT).mT
        a, b = torch.cat(self.left, dim=-1), torch.cat(self.right, dim=-1)
        with full_precision(b.device):
            return a @ _solve(b.mT @ b, shift, b.mT)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right^T`` in place, for matrices or stacks of them."""
    if total.ndim == 2:
        total.addmm_(left, right.mT)
    else:
        total.baddbmm_(left, right.mT)


def _solve(gram: Tensor, shift: Tensor, right: Tensor) -> Tensor:
    """``(gram + shift I)^-1 right`` by Cholesky; `gram` is used up."""
    gram.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))
