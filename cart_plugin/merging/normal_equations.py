"""The sums of a least-squares system over tasks, for task vectors that come as factors.

With ``C_t = V S^2 V^T / z^2`` for task vectors ``D_t = U S V^T`` all sums over tasks are products
of factors side by side with one matrix ``B = [V S / z]`` (n, K): ``sum_t w_t C_t = B B^T``,
``sum_t w_t D_t = A B^T``, and ``sum_t w_t D_t C_t`` with the columns of A scaled. A system
``X (B B^T + r I)^-1`` is one of K = sum of ranks unknowns by the push-through identity, and solved
as such while K is smaller than n. Beyond, only dense sums are kept, for any number of tasks.

Both are well conditioned: the largest eigenvalue is at most ``sum_t w_t`` (and the ridge), the
smallest at least ``ridge / n`` of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.gram import largest_eigenvalue
from cart_plugin.linalg.precision import full_precision

LEAST_KEPT = 0.1
"""A sum that keeps less of the task vectors than this (of weight 1 on average) is not scaled up any
further: at full rank it is nothing but rounding."""


class _Dense(NamedTuple):
    """``sum w D C``, ``sum w D`` and ``sum w C``."""

    fitted: Tensor
    summed: Tensor
    gram: Tensor


class _Term(NamedTuple):
    """A task's part of the sums."""

    factors: LowRank
    size: Tensor  # z
    weight: float

    @property
    def shares(self) -> Tensor:
        """Singular values over z; zeros for a weight that the task did not change."""
        return torch.where(self.size > 0, self.factors.S / self.size, 0)


class System:
    """The sums of the normal equations: as factors, or dense once that is smaller.

    Args:
        width: n, if the task vectors are written in fewer coordinates than they have inputs
            (`cart_plugin.merging.spans`).
    """

    def __init__(self, width: int | None = None) -> None:
        self.width = width
        self.waiting: list[_Term] = []  # not in the dense sums
        self.dense: _Dense | None = None
        self.ranks = 0
        self.weights: list[float] = []
        self.trace = torch.zeros((), device="cpu")  # of sum w C
        # sum w ||D||^2, in fp64: fp32 has no room for squares
        self.energy = torch.zeros((), device="cpu")
        self.noise: Tensor | None = None  # what of ||sum w D||^2 to expect of rounding

    def add(
        self,
        factors: LowRank,
        weight: float,
        size: Tensor | None = None,
        energy: Tensor | None = None,
        rounding: Tensor | None = None,
    ) -> None:
        """Add a task's terms.

        Args:
            factors: of D; U need not be orthogonal.
            weight: w.
            size: z, one number a matrix of a stack and a dimension of 1; the largest singular value
                if None, so that the covariance's largest eigenvalue is 1.
            energy: ``||D||^2`` in fp64, if U is not orthogonal.
            rounding: squared norm of the rounding in all of the task vector, in fp64; None for
                nothing.
        """
        if factors.S.device.type == "mps":  # no fp64, and not all of the linear algebra
            factors = factors.to(torch.device("cpu"))
        if energy is None:
            energy = factors.S.double().square().sum(dim=-1)
        term = _Term(factors, factors.S[..., :1] if size is None else size, weight)
        self.weights.append(weight)
        self.waiting.append(term)
        self.trace = self.trace + weight * term.shares.square().sum(dim=-1)
        self.energy = self.energy + weight * energy
        if rounding is not None:
            m, n, k = factors.U.shape[-2], factors.Vh.shape[-1], (factors.S > 0).sum(dim=-1)
            within = rounding.to(energy.device) * (1 - (1 - k / m) * (1 - k / n))
            self.noise = weight**2 * within + (0 if self.noise is None else self.noise)
        self.ranks += factors.rank
        if self.ranks >= factors.Vh.shape[-1]:
            self._pour()

    def add_whole(self, difference: Tensor, weight: float) -> None:
        """Add the terms of a task vector of which nothing is left out: without its decomposition.

        Args:
            difference: D, ``(m, n)`` or a stack; n is small, since the sums are dense from here on.
            weight: w. z is the largest singular value.
        """
        if self.waiting:
            self._pour()
        with full_precision(difference.device):
            gram = difference.mT @ difference
            size = largest_eigenvalue(gram)  # z^2
            gram.mul_((weight / torch.where(size > 0, size, 1))[..., None, None])
            terms = _Dense(difference @ gram, weight * difference, gram)
        self.weights.append(weight)
        self.trace = self.trace + terms.gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        energy = torch.linalg.vector_norm(difference, dim=(-2, -1), dtype=torch.float64).square()
        self.energy = self.energy + weight * energy
        if self.dense is None:
            self.dense = terms
            return
        for total, term in zip(self.dense, terms, strict=True):
            total.add_(term)

    def metric(self, ridge: float, *, directions: Tensor | None = None) -> Tensor:
        """``sum w C + r I``, by which the system weighs a change of its solution; `(n, n)`.

        Args:
            ridge: r, as in `solve`.
            directions: as in `solve`.
        """
        if self.dense is None or self.waiting:
            self._pour()
        assert self.dense is not None
        gram = self.dense.gram.clone()
        shift = ridge * self._mean_eigenvalue(gram.shape[-1], directions)
        gram.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
        return gram

    def strength(
        self, pull: float, *, directions: Tensor | None = None, least_kept: float = LEAST_KEPT
    ) -> Tensor:
        """By what `solve` multiplies ``sum w D``: ``s / rho``, one number a matrix of a stack.

        Args:
            pull: s, as in `solve`.
            directions: as in `solve`.
            least_kept: as in `solve`.
        """
        if self.dense is None or self.waiting:
            self._pour()
        assert self.dense is not None
        summed = self.dense.summed
        mean = self._mean_eigenvalue(summed.shape[-1], directions)
        norm = torch.linalg.vector_norm(summed, dim=(-2, -1), dtype=torch.float64)
        return self._strength(norm.square(), pull * mean, least_kept)

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
        shares = [term.shares for term in self.waiting]
        left = [term.weight**0.5 * term.factors.U * term.size[..., None] for term in self.waiting]
        right = [
            term.factors.Vh.mT * (term.weight**0.5 * share).unsqueeze(-2)
            for term, share in zip(self.waiting, shares, strict=True)
        ]
        self.waiting = []
        return torch.cat(left, dim=-1), torch.cat(shares, dim=-1), torch.cat(right, dim=-1)

    def solve(
        self,
        ridge: float,
        pull: float,
        *,
        directions: Tensor | None = None,
        least_kept: float = LEAST_KEPT,
    ) -> Tensor:
        """``(sum w D C + s P) (sum w C + r I)^-1`` for P the sum at full strength.

        Args:
            ridge: r, relative to the mean eigenvalue of ``sum w C``.
            pull: s, relative to the same.
            directions: of how many eigenvalues the mean is, a number for each matrix of a stack;
                all n if None.
            least_kept: see `LEAST_KEPT`.
        """
        if self.dense is not None:
            fitted, summed, gram = self.dense
            with full_precision(gram.device):
                mean = self._mean_eigenvalue(gram.shape[-1], directions)
                strength = self.strength(pull, directions=directions, least_kept=least_kept)
                fitted.add_(summed.mul_(strength[..., None, None]))
                return _solve(gram, ridge * mean, fitted.mT).mT
        plain, shares, right = self._products()
        with full_precision(plain.device):
            mean = self._mean_eigenvalue(right.shape[-2], directions)
            gram = right.mT @ right
            # ||A B^T||^2 = <A^T A, B^T B>, with columns of A of moderate size: fp32 has no room.
            size = plain.abs().amax(dim=(-2, -1), keepdim=True)
            scaled = plain / torch.where(size > 0, size, 1)
            kept = ((scaled.mT @ scaled) * gram).sum(dim=(-2, -1), dtype=torch.float64)
            del scaled
            energy = kept * size[..., 0, 0].double().square()
            strength = self._strength(energy, pull * mean, least_kept)
            left = plain.mul_((shares.square() + strength[..., None]).unsqueeze(-2))
            if left.shape[-2] < right.shape[-2]:  # fewer right-hand sides
                return _solve(gram, ridge * mean, left.mT).mT @ right.mT
            return left @ _solve(gram, ridge * mean, right.mT)

    def _mean_eigenvalue(self, n: int, directions: Tensor | None) -> Tensor:
        """Of ``sum w C``; where nothing moved, any number will do."""
        count = self.width or n if directions is None else directions.clamp(1, n)
        return torch.where(self.trace > 0, self.trace, 1) / count

    def _strength(self, energy_of_sum: Tensor, pull: Tensor, least_kept: float) -> Tensor:
        """What ``sum w D`` is multiplied by: ``pull / rho``.

        With rounding in the sum, it is by Wiener's estimate of what is real in it, at the strength
        of that: the same, until what is real keeps less than `least_kept`.
        """
        if self.noise is not None:
            real = (energy_of_sum - self.noise).clamp_min(0)
            pull = pull * (real / torch.where(energy_of_sum > 0, energy_of_sum, 1)).to(pull.dtype)
            energy_of_sum = real
        kept = energy_of_sum / torch.where(self.energy > 0, self.energy, 1)
        mean_weight = sum(self.weights) / len(self.weights)
        return (pull / kept.clamp_min(least_kept * mean_weight)).to(pull.dtype)


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
