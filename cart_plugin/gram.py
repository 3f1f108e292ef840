"""Leading left singular vectors from Gram matrices, and what rounding does to them.

``x x^T`` has the squared singular values of ``x``, so fp32 leaves little of those below 1e-3 of the
largest one. Whoever works on a Gram matrix has to notice: `leading_left` estimates the damage to
the truncated matrix and repeats the work in fp64 where it is too large.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import scipy.linalg
import torch
from torch import Tensor


class LeftVectors(NamedTuple):
    """Leading left singular vectors of a stack of matrices.

    Attributes:
        values: squared singular values, descending, and the largest one that is dropped (zero if
            there is none): ``(stack, k + 1)``.
        vectors: orthonormal columns, ``(stack, m, k)``.
        error: relative error of the truncated matrix due to rounding of the Gram matrix, the worst
            of the stack.
    """

    values: Tensor
    vectors: Tensor
    error: float


def leading_left(x: Tensor, k: int, *, tolerance: float) -> LeftVectors:
    """The k leading left singular vectors of ``x`` ``(stack, m, n)``, by its Gram matrices.

    Args:
        x: fp32 or fp64, entries of moderate size.
        k: how many, at most ``m``.
        tolerance: relative error of the truncated matrix above which fp32 is not enough.
    """
    energies = torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float64).square()
    values, vectors = _leading(x, k)
    error = float(_rounding_error(values, energies, x.shape[1]).max())
    if error > tolerance and x.dtype != torch.float64:
        values, vectors = _leading(x.to(torch.float64), k)
        error = torch.finfo(x.dtype).eps
    return LeftVectors(values.to(x.dtype), vectors.to(x.dtype), error)


def _gram(x: Tensor) -> Tensor:
    """Lower triangles of ``x x^T``, above which lies rubbish: 5/8 of the full product's work."""
    stack, m, _ = x.shape
    step = max(256, math.ceil(m / 4))
    gram = x.new_empty(stack, m, m)
    for start in range(0, m, step):
        end = min(start + step, m)
        gram[:, start:end, :end] = x[:, start:end] @ x[:, :end].mT
    return gram


def _leading(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs of the Gram matrices of ``x`` ``(stack, m, n)``."""
    m = x.shape[1]
    count = min(k + 1, m)
    gram = _gram(x)
    pairs = []
    if gram.device.type == "cpu":
        # LAPACK's partial eigensolver (MRRR); torch has only the full one.
        pairs = [
            scipy.linalg.eigh(
                matrix.mT.numpy(),  # Fortran order, as LAPACK wants it: no copy
                lower=False,
                subset_by_index=(m - count, m - 1),
                driver="evr",
                overwrite_a=True,
                check_finite=False,
            )
            for matrix in gram
        ]
    if pairs and all(len(pair[0]) == count for pair in pairs):
        values = torch.stack([torch.from_numpy(pair[0]) for pair in pairs])
        vectors = torch.stack([torch.from_numpy(pair[1]) for pair in pairs])
    else:
        # Also where the partial one loses some of a cluster of equal eigenvalues, as it may.
        values, vectors = torch.linalg.eigh(_gram(x) if pairs else gram)
    values = values.flip(-1)[:, : k + 1].clamp_min(0)
    if k == m:
        values = torch.cat([values, torch.zeros_like(values[:, :1])], 1)
    return values, vectors.flip(-1)[..., :k]


def _rounding_error(values: Tensor, energies: Tensor, m: int) -> Tensor:
    """Relative error of the truncated matrices that rounding of their Gram matrices leads to.

    First-order perturbation: rounding of size ``r = eps * values[0] / sqrt(m)`` between any two
    directions turns kept eigenvectors (value ``t``) towards dropped ones (value ``d``) by
    ``r / (t - d)``, which adds ``r^2 (t + d) / (t - d)^2`` to the squared error. Two sums matter:
    the last kept against the first dropped, and all kept against the mass of small ones, on which
    rounding was measured at half that size.

    Args:
        values: the ``k + 1`` largest eigenvalues, descending, ``(stack, k + 1)``.
        energies: sums of all eigenvalues, ``(stack,)``.
        m: size of the Gram matrices.
    """
    k = values.shape[-1] - 1
    if k == m:
        return torch.zeros_like(energies)
    size = torch.finfo(values.dtype).eps * values[:, 0].double() / math.sqrt(m)
    kept, dropped = values[:, :k].double(), values[:, k:].double()
    total = kept.sum(-1)
    mean = ((energies - total).clamp_min(0) / (m - k))[:, None].minimum(dropped)

    def turned(kept: Tensor, dropped: Tensor) -> Tensor:
        gap = (kept - dropped).clamp_min(torch.finfo(torch.float64).tiny)
        return ((kept + dropped) / gap**2).sum(-1)

    near = size**2 * turned(kept[:, -1:], dropped)
    far = (size / 2) ** 2 * (m - k) * turned(kept, mean)
    return torch.where(total > 0, ((near + far) / total).sqrt(), 0.0)
