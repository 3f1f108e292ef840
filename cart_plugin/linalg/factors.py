"""The factors that a truncated singular value decomposition returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cart_plugin.linalg.precision import full_precision


@dataclass(frozen=True)
class LowRank:
    """Factors of a truncated SVD, ``U diag(S) Vh``; a leading dimension for stacks of matrices.

    Attributes:
        U: left singular vectors, ``(m, k)``.
        S: singular values in descending order, ``(k,)``.
        Vh: right singular vectors, ``(k, n)``. Where a singular value is zero, one of its two
            vectors may be zero. The vectors of the longer side are ``X^T u / s``: of length 1, and
            orthogonal up to rounding of ``S[0]``, so that those of tiny values may overlap.
        error: estimated relative error (Frobenius) of the truncated matrix, the worst of a stack;
            for ``subspace`` see `cart_plugin.linalg.subspace.near_subspace`.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    error: float = 0.0

    @property
    def rank(self) -> int:
        """Number of singular directions kept."""
        return self.S.shape[-1]

    @property
    def mT(self) -> LowRank:  # noqa: N802  (torch's name for it)
        """The factors of the transposed matrices."""
        return LowRank(self.Vh.mT, self.S, self.U.mT, self.error)

    def dense(self) -> Tensor:
        """The truncated matrices, ``(m, n)`` each."""
        with full_precision(self.U.device):
            return (self.U * self.S[..., None, :]) @ self.Vh

    def add_to_(self, out: Tensor, scale: float = 1.0) -> Tensor:
        """Add ``scale`` times the truncated matrices to ``out`` in place, without forming them."""
        with full_precision(out.device):
            left = self.U * self.S[..., None, :]
            if out.ndim == 2:
                return out.addmm_(left, self.Vh, alpha=scale)
            return out.baddbmm_(left, self.Vh, alpha=scale)

    def double(self) -> LowRank:
        """The factors in fp64."""
        return LowRank(self.U.double(), self.S.double(), self.Vh.double(), self.error)

    def to(self, device: torch.device) -> LowRank:
        """The factors on a device."""
        return LowRank(self.U.to(device), self.S.to(device), self.Vh.to(device), self.error)
