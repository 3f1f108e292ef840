"""How truncated task vectors are combined from the weights alone, without a scale to tune.

CART adds ``lambda * sum_t D_t`` to the centre, for truncated centred task vectors ``D_t`` of one
weight. What that costs a task is the interference of the others on its own inputs. The paper bounds
it (arXiv 2412.12153, section 3: the loss of merging is at most a sum over tasks of
``||(M - D_t) x||`` over the task's inputs ``x``); here it is minimised instead.

The inputs of task t are not known, but they leave their trace: gradient descent moves a weight
only within the span of its inputs, so that ``D_t^T D_t`` stands for their covariance. With
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
and the fewer the tasks are, which is why the best lambda of CART grows with the rank. Tasks whose
row and column spaces are orthogonal do not: ``rho`` is 1, and M ``sum_t D_t`` whatever the ridge.

Kin: RegMean (arXiv 2212.09849) solves the first term's system with covariances of real activations;
WUDI (arXiv 2503.08099) runs gradient descent on a data-free objective of this kind; ACE-Merging
estimates the covariances from the task vectors, too. What was tried besides, and what it brought:
``benchmarks/notes/auto.md``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cart_plugin.lowrank import LowRank
from cart_plugin.precision import full_precision

RIDGE = 1.0
PULL = 1.0
AUTO_RANK_RATIO = 0.16

# A sum that keeps less of the task vectors than this is not scaled up any further: at full rank it
# is nothing but rounding.
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

    Args:
        parts: a task's truncated task vector, ``(m, n)`` or a stack of such, and its weight, one
            pair after the other. The weights are positive.
        ridge: r, relative to the mean eigenvalue of ``sum_t w_t C_t``; above 0. Towards infinity
            M goes to zero, that is, the merged weight to the centre.
        pull: s, relative to the same. At 0, M is zero where no task moved.

    Returns:
        M, of the factors' dtype, ``(m, n)`` or a stack. Zero if all task vectors are.
    """
    total = _System()
    for factors, weight in parts:
        total.add(factors, weight)
    return total.solve(ridge, pull)


class _System:
    """The sums of the normal equations: as factors, or dense once that is smaller.

    In both forms: ``sum w D C``, ``sum w D`` and ``sum w C``.
    """

    def __init__(self) -> None:
        # A task's U, S over its largest, that largest, and V S over the largest.
        self.factors: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.dense: tuple[Tensor, Tensor, Tensor] | None = None
        self.ranks = 0
        self.trace: Tensor | float = 0.0
        self.energy: Tensor | float = 0.0
        self.n = 0

    def add(self, factors: LowRank, weight: float) -> None:
        """Add a task's terms."""
        self.n = factors.Vh.shape[-1]
        self.ranks += factors.S.shape[-1]
        largest = factors.S[..., :1]
        # The task vectors of a weight that a task did not change are zero, and count nothing.
        shares = torch.where(largest > 0, factors.S / largest, 0)
        self.trace = self.trace + weight * shares.square().sum(dim=-1)
        self.energy = self.energy + weight * factors.S.square().sum(dim=-1)
        root = weight**0.5
        right = factors.Vh.mT * (root * shares).unsqueeze(-2)
        self.factors.append((root * factors.U, shares, largest, right))
        if self.dense is not None or self.ranks >= self.n:
            self._pour()

    def _pour(self) -> None:
        """Turn the factors that wait into dense sums."""
        with full_precision(self.factors[0][0].device):
            products = (self._left(1.0, 0.0), self._left(0.0, 1.0), self._right())
            right = products[-1]
            if self.dense is None:
                self.dense = tuple(left @ right.mT for left in products)  # type: ignore[assignment]
            else:
                for total, left in zip(self.dense, products, strict=True):
                    _add_product_(total, left, right)
        self.factors = []

    def _left(self, fitted: float, summed: float | Tensor) -> Tensor:
        """A with ``A B^T = fitted * sum w D C + summed * sum w D`` (`summed`: one a matrix)."""
        if isinstance(summed, Tensor):
            summed = summed[..., None]
        return torch.cat(
            [
                left * (fitted * largest * shares.square() + summed * largest).unsqueeze(-2)
                for left, shares, largest, _ in self.factors
            ],
            dim=-1,
        )

    def _right(self) -> Tensor:
        return torch.cat([right for *_, right in self.factors], dim=-1)

    def solve(self, ridge: float, pull: float) -> Tensor:
        """``(sum w D C + s P) (sum w C + r I)^-1``."""
        trace = torch.as_tensor(self.trace)
        mean = torch.where(trace > 0, trace, 1) / self.n  # where nothing moved, any will do
        if self.dense is not None:
            fitted, summed, gram = self.dense
            with full_precision(gram.device):
                strength = pull * mean / self._kept(summed.square().sum(dim=(-2, -1)))
                fitted.add_(summed.mul_(strength[..., None, None]))
                return _solve(gram, ridge * mean, fitted.mT).mT
        b = self._right()
        with full_precision(b.device):
            gram, plain = b.mT @ b, self._left(0.0, 1.0)
            strength = pull * mean / self._kept(((plain.mT @ plain) * gram).sum(dim=(-2, -1)))
            return self._left(1.0, strength) @ _solve(gram, ridge * mean, b.mT)

    def _kept(self, energy_of_sum: Tensor) -> Tensor:
        """``rho``: how much of the task vectors their sum keeps."""
        energy = torch.as_tensor(self.energy)
        return (energy_of_sum / torch.where(energy > 0, energy, 1)).clamp_min(_LEAST_KEPT)


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
