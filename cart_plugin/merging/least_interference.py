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

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.precision import full_precision

RIDGE = 1.0
PULL = 1.0
AUTO_RANK_RATIO = 0.16

# A sum that keeps less of the task vectors than this (of weight 1 on average) is not scaled up any
# further: at full rank it is nothing but rounding.
_LEAST_KEPT = 0.1


def least_interference(
    parts: Iterable[tuple[LowRank, float]], ridge: float = RIDGE, pull: float = PULL
) -> Tensor:
    """The matrix that disturbs the tasks least on their own inputs; see the module.

    With ``C_t = V S^2 V^T / S_1^2`` all sums are products of factors side by side with one matrix
    ``B = [V S / S_1]`` (n, K): ``M = A B^T (B B^T + r I)^-1``, or, by the push-through identity,
    ``A (B^T B + r I)^-1 B^T``: a system of K = sum of ranks unknowns, taken while that is smaller
    than n. Beyond, only two (m, n) and one (n, n) sums are kept, for any number of tasks.

    Both are well conditioned: the largest eigenvalue is at most ``sum_t w_t`` (and the ridge), the
    smallest at least ``ridge / n`` of it.

    Peak memory, the parts included, is below ``2 k (m + n) + 2 k^2 + 3 m n`` numbers, for k the
    smaller of K and n.

    Args:
        parts: a task's truncated task vector, ``(m, n)`` or a stack of such, and its weight, one
            pair after the other. The weights are positive.
        ridge: r, relative to the mean eigenvalue of ``sum_t w_t C_t``; above 0. Towards infinity,
            at a fixed `pull`, M goes to zero, that is, the merged weight to the centre.
        pull: s, relative to the same. At 0, M is zero where no task moved.

    Returns:
        M, of the factors' dtype, ``(m, n)`` or a stack. Zero if all task vectors are.
    """
    total = _System()
    for factors, weight in parts:
        total.add(factors, weight)
    return total.solve(ridge, pull)


class _Dense(NamedTuple):
    """``sum w D C``, ``sum w D`` and ``sum w C``."""

    fitted: Tensor
    summed: Tensor
    gram: Tensor


class _System:
    """The sums of the normal equations: as factors, or dense once that is smaller."""

    def __init__(self) -> None:
        self.waiting: list[tuple[LowRank, float]] = []  # not in the dense sums
        self.dense: _Dense | None = None
        self.ranks = 0
        self.weights: list[float] = []
        self.trace = torch.zeros(())  # of sum w C
        self.energy = torch.zeros(())  # sum w ||D||^2, in fp64: fp32 has no room for squares

    def add(self, factors: LowRank, weight: float) -> None:
        """Add a task's terms."""
        if factors.S.device.type == "mps":  # no fp64, and not all of the linear algebra
            factors = factors.to(torch.device("cpu"))
        self.weights.append(weight)
        self.waiting.append((factors, weight))
        self.trace = self.trace + weight * _shares(factors).square().sum(dim=-1)
        self.energy = self.energy + weight * factors.S.double().square().sum(dim=-1)
        self.ranks += factors.rank
        if self.ranks >= factors.Vh.shape[-1]:
            self._pour()

    def _pour(self) -> None:
        """Turn the factors that wait into dense sums."""
        plain, shares, right = self._products()
        with full_precision(plain.device):
            lefts = (plain * shares.square().unsqueeze(-2), plain, right)
            if self.dense is None:
                self.dense = _Dense(*(left @ right.mT for left in lefts))
            else:
                for total, left in zip(self.dense, lefts, strict=True):
                    _add_product_(total, left, right)

    def _products(self) -> tuple[Tensor, Tensor, Tensor]:
        """The factors that wait, side by side: A, shares and B with ``sum w D = A B^T``.

        ``sum w D C`` is ``A diag(shares^2) B^T``, and ``sum w C`` is ``B B^T``.
        """
        shares = [_shares(factors) for factors, _ in self.waiting]
        left = [w**0.5 * f.U * f.S[..., None, :1] for f, w in self.waiting]
        right = [
            f.Vh.mT * (w**0.5 * share).unsqueeze(-2)
            for (f, w), share in zip(self.waiting, shares, strict=True)
        ]
        self.waiting = []
        return torch.cat(left, dim=-1), torch.cat(shares, dim=-1), torch.cat(right, dim=-1)

    def solve(self, ridge: float, pull: float) -> Tensor:
        """``(sum w D C + s P) (sum w C + r I)^-1``."""
        if self.dense is not None:
            fitted, summed, gram = self.dense
            with full_precision(gram.device):
                mean = self._mean_eigenvalue(gram.shape[-1])
                norm = torch.linalg.vector_norm(summed, dim=(-2, -1), dtype=torch.float64)
                strength = self._strength(norm.square(), pull * mean)
                fitted.add_(summed.mul_(strength[..., None, None]))
                return _solve(gram, ridge * mean, fitted.mT).mT
        plain, shares, right = self._products()
        with full_precision(plain.device):
            mean = self._mean_eigenvalue(right.shape[-2])
            gram = right.mT @ right
            # ||A B^T||^2 = <A^T A, B^T B>, with columns of A of moderate size: fp32 has no room.
            size = plain.abs().amax(dim=(-2, -1), keepdim=True)
            scaled = plain / torch.where(size > 0, size, 1)
            kept = ((scaled.mT @ scaled) * gram).sum(dim=(-2, -1), dtype=torch.float64)
            del scaled
            strength = self._strength(kept * size[..., 0, 0].double().square(), pull * mean)
            left = plain.mul_((shares.square() + strength[..., None]).unsqueeze(-2))
            if left.shape[-2] < right.shape[-2]:  # fewer right-hand sides
                return _solve(gram, ridge * mean, left.mT).mT @ right.mT
            return left @ _solve(gram, ridge * mean, right.mT)

    def _mean_eigenvalue(self, n: int) -> Tensor:
        """Of ``sum w C``; where nothing moved, any number will do."""
        return torch.where(self.trace > 0, self.trace, 1) / n

    def _strength(self, energy_of_sum: Tensor, pull: Tensor) -> Tensor:
        """What ``sum w D`` is multiplied by: ``pull / rho``."""
        kept = energy_of_sum / torch.where(self.energy > 0, self.energy, 1)
        mean_weight = sum(self.weights) / len(self.weights)
        return (pull / kept.clamp_min(_LEAST_KEPT * mean_weight)).to(pull.dtype)


def _shares(factors: LowRank) -> Tensor:
    """Singular values over the largest; zeros for a weight that the task did not change."""
    largest = factors.S[..., :1]
    return torch.where(largest > 0, factors.S / largest, 0)


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
