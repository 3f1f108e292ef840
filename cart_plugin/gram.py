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

# Where the partial eigensolver beats the full one clearly: few directions of large matrices. It
# runs on scipy's threads, which wait for each other thousands of times a matrix; where torch's own
# or another program's are busy beside them, that can take far longer than the work itself.
_PARTIAL_SIDE = 1536
_PARTIAL_SHARE = 0.2
_SMALLEST = 1e-150  # its square is no underflow in fp64


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
    energies = torch.linalg.vector_norm(x, dim=2).double().square().sum(1)
    values, vectors, noise = _leading(x, k, x.dtype)
    error = float(_rounding_error(values, energies, x.shape[1], noise).max())
    if error > tolerance and x.dtype != torch.float64:
        values, vectors, _ = _leading(x, k, torch.float64)
        error = torch.finfo(x.dtype).eps
    return LeftVectors(values.to(x.dtype), vectors.to(x.dtype), error)


def _gram(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Lower triangles of ``x x^T``, above which lies rubbish: 5/8 of the full product's work.

    Blocks of rows are converted to ``dtype`` one by one, so that no copy of ``x`` comes about.
    """
    stack, m, _ = x.shape
    step = max(256, math.ceil(m / 4))
    gram = x.new_empty(stack, m, m, dtype=dtype)
    for i in range(0, m, step):
        rows = x[:, i : i + step].to(dtype)
        for j in range(0, i + 1, step):
            columns = rows if i == j else x[:, j : j + step].to(dtype)
            gram[:, i : i + step, j : j + step] = rows @ columns.mT
    return gram


def _leading(x: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Leading eigenpairs of the Gram matrices of ``x`` ``(stack, m, n)``, and the solver's noise.

    Noise is the size of rounding errors in units of ``eps * values[0] / sqrt(m)``, as measured.
    """
    m = x.shape[1]
    gram = _gram(x, dtype)
    partial = x.device.type == "cpu" and m >= _PARTIAL_SIDE and k < _PARTIAL_SHARE * m
    found = [_partial_eigh(matrix, k + 1) for matrix in gram] if partial else []
    if partial and all(len(values) == k + 1 for values, _ in found):
        values = torch.stack([values for values, _ in found])
        vectors = torch.stack([vectors for _, vectors in found])
        noise = 0.4
    else:
        values, vectors = torch.linalg.eigh(_gram(x, dtype) if partial else gram)
        noise = 4.0
    values = values.flip(-1)[:, : k + 1].clamp_min(0)
    if k == m:
        values = torch.cat([values, torch.zeros_like(values[:, :1])], 1)
    return values, vectors.flip(-1)[..., :k], noise


def _partial_eigh(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """LAPACK's partial eigensolver (MRRR), which torch lacks, on the lower triangle of a matrix.

    Of a cluster of equal eigenvalues it may lose some, and then returns fewer than ``count``.
    """
    m = gram.shape[0]
    values, vectors = scipy.linalg.eigh(
        gram.mT.numpy(),  # Fortran order, as LAPACK wants it: no copy
        lower=False,
        subset_by_index=(m - count, m - 1),
        driver="evr",
        overwrite_a=True,
        check_finite=False,
    )
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _rounding_error(values: Tensor, energies: Tensor, m: int, noise: float) -> Tensor:
    """Relative error of the truncated matrices that rounding of their Gram matrices leads to.

    First-order perturbation: rounding ``r = noise * eps * values[0] / sqrt(m)`` between any two
    directions turns kept eigenvectors (value ``t``) towards dropped ones (value ``d``) by
    ``r / (t - d)``, which adds ``r^2 (t + d) / (t - d)^2`` to the squared error. Two sums matter:
    the last kept against the first dropped, and all kept against the mass of small ones, on which
    rounding was measured at half that size.

    Args:
        values: the ``k + 1`` largest eigenvalues, descending, ``(stack, k + 1)``.
        energies: sums of all eigenvalues, ``(stack,)``.
        m: size of the Gram matrices.
        noise: see `_leading`.
    """
    k = values.shape[-1] - 1
    if k == m:
        return torch.zeros_like(energies)
    size = noise * torch.finfo(values.dtype).eps * values[:, :1].double() / math.sqrt(m)
    kept, dropped = values[:, :k].double(), values[:, k:].double()
    total = kept.sum(-1)
    mean = ((energies - total).clamp_min(0) / (m - k))[:, None].minimum(dropped)

    def turned(rounding: Tensor, kept: Tensor, dropped: Tensor) -> Tensor:
        gap = (kept - dropped).clamp_min(_SMALLEST)
        # No direction can do more damage than to be lost.
        return (rounding * (kept + dropped) / gap**2).minimum(2 * (kept + rounding.sqrt())).sum(-1)

    near = turned(size**2, kept[:, -1:], dropped)
    far = turned((size / 2) ** 2 * (m - k), kept, mean)
    return torch.where(total > 0, ((near + far) / total).sqrt(), 0.0)
