"""The sums of a least-squares system over tasks, for task vectors that come as factors.

With ``C_t = D_t^T D_t / ||D_t||_2^2`` for truncated task vectors ``D_t = U S V^T`` all sums over
tasks are products of factors side by side with one matrix ``B = [V S / S_1]`` (n, K):
``sum_t w_t C_t = B B^T``, and ``sum_t w_t D_t C_t = A B^T``. A system ``X (B B^T + r I)^-1`` is one
of K = sum of ranks unknowns by the push-through identity, and solved as such while K is smaller
than n. Beyond, only dense sums are kept, for any number of tasks.

Both are well conditioned: the largest eigenvalue is at most ``sum_t w_t`` (and the ridge), the
smallest at least ``ridge / n`` of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.precision import full_precision

# A sum that keeps less of the task vectors than this (of weight 1 on average) is not scaled up any
# further: at full rank it is nothing but rounding.
_LEAST_KEPT = 0.1


class _Dense(NamedTuple):
    """``sum w D C``, ``sum w C`` and, where it is needed, ``sum w D``."""

    fitted: Tensor
    gram: Tensor
    summed: Tensor | None


class System:
    """The sums of the normal equations: as factors, or dense once that is smaller.

    Args:
        summed: whether ``sum w D`` is needed, by `solve_towards_sum`.
    """

    def __init__(self, *, summed: bool) -> None:
        self.waiting: list[tuple[LowRank, float]] = []  # not in the dense sums
        self.summed = summed
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
            lefts = [plain * shares.square().unsqueeze(-2), right]
            if self.summed:
                lefts.append(plain)
            if self.dense is None:
                found = [left @ right.mT for left in lefts]
                self.dense = _Dense(found[0], found[1], found[2] if self.summed else None)
                return
            for total, left in zip(self.dense, lefts, strict=False):
                assert total is not None
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

    def solve_towards_sum(self, ridge: float, pull: float) -> Tensor:
        """``(sum w D C + s P) (sum w C + r I)^-1`` for P the sum at full strength."""
        if self.dense is not None:
            fitted, gram, summed = self.dense
            assert summed is not None
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
            return _push_through(left, right, gram, ridge * mean)

    def solve_towards(self, target: Tensor, ridge: float) -> Tensor:
        """``(sum w D C + r P) (sum w C + r I)^-1`` for a given P, which is used up.

        Args:
            target: P, ``(m, n)`` or a stack.
            ridge: r, relative to the mean eigenvalue of ``sum w C``.
        """
        with full_precision(target.device):
            if self.dense is not None:
                fitted, gram, _ = self.dense
                shift = ridge * self._mean_eigenvalue(gram.shape[-1])
                fitted.add_(target.mul_(shift[..., None, None]))
                return _solve(gram, shift, fitted.mT).mT
            plain, shares, right = self._products()
            shift = ridge * self._mean_eigenvalue(right.shape[-2])
            # P + (A' B^T - P B B^T) (B B^T + r I)^-1: P, corrected where the tasks' inputs lie.
            left = plain.mul_(shares.square().unsqueeze(-2)).sub_(target @ right)
            return target.add_(_push_through(left, right, right.mT @ right, shift))

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


def _push_through(left: Tensor, right: Tensor, gram: Tensor, shift: Tensor) -> Tensor:
    """``L B^T (B B^T + r I)^-1 = L (B^T B + r I)^-1 B^T``; `gram`, ``B^T B``, is used up."""
    if left.shape[-2] < right.shape[-2]:  # fewer right-hand sides
        return _solve(gram, shift, left.mT).mT @ right.mT
    return left @ _solve(gram, shift, right.mT)


def _solve(gram: Tensor, shift: Tensor, right: Tensor) -> Tensor:
    """``(gram + shift I)^-1 right`` by Cholesky; `gram` is used up."""
    gram.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))
