"""Leading left singular vectors from Gram matrices, and what rounding does to them.

``x x^T`` has the squared singular values of ``x``, so fp32 leaves little of those below 1e-3 of the
largest one. Whoever works on a Gram matrix has to notice: `leading_left` estimates the damage to
the truncated matrix and repeats the work in fp64 where it is too large.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import scipy.linalg
import scipy.sparse.linalg
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

# Where the partial eigensolver beats the full one clearly: few directions of large matrices. It
# runs on scipy's threads, which wait for each other thousands of times a matrix; where torch's own
# or another program's are busy beside them, that can take far longer than the work itself.
PARTIAL_SIDE = 1536
_PARTIAL_SHARE = 0.25
_LANCZOS_SIDE = 64  # below, LAPACK is as fast
# Where the last kept eigenvalue is this small a share of the first, and how many power steps there.
_STEEP = 1e-4
_STEPS = 3
_SMALL = 1e-20
_SMALLEST = 1e-150  # its square is no underflow in fp64


def total_energy(x: Tensor) -> Tensor:
    """Sums of squares of matrices ``(stack, m, n)`` to more digits than fp32 has, ``(stack,)``."""
    # Along what is contiguous: a transposed view would take ten times as long.
    along = -1 if x.stride(-1) == 1 else -2
    lines = torch.linalg.vector_norm(x, dim=along)
    lines = lines.cpu() if lines.device.type == "mps" else lines  # it has no fp64
    energy = lines.double().square().sum(-1)
    if not bool(((energy > _SMALL) & (energy < 1 / _SMALL)).all()):  # squares may leave fp32
        x = x.to(lines.device)
        energy = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float64).square()
    return energy


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


class Approximation(NamedTuple):
    """What eigenvectors of fp32 Gram matrices say, before anyone asks how good they are.

    Attributes:
        values: squared singular values, descending, ``(stack, count + 1)``, for some ``count`` of
            at least ``k``.
        vectors: left singular vectors, ``(stack, m, count)``.
        noise: see `_leading`.
    """

    values: Tensor
    vectors: Tensor
    noise: float


def leading_left(x: Tensor, k: int, *, tolerance: float) -> LeftVectors:
    """The k leading left singular vectors of ``x`` ``(m, n)`` or a stack, by its Gram matrices.

    Args:
        x: fp32 or fp64, entries of moderate size.
        k: how many, at most ``m``.
        tolerance: relative error of the truncated matrix that fp32 may not exceed; see `refined`.
    """
    return refined(x, k, approximate_left(x, k), tolerance=tolerance)


def approximate_left(x: Tensor, k: int) -> Approximation:
    """Leading eigenvectors of Gram matrices in the precision of ``x``, without a judgement."""
    # More vectors than asked for, so that a power step can correct these where fp32 is not enough:
    # twice as many where the eigensolver returns all of them anyhow.
    extra = max(8, k // 4 if _solved_partially(x, k) else k)
    return Approximation(*_leading(x, min(x.shape[-2], k + extra), x.dtype))


def refined(x: Tensor, k: int, found: Approximation, *, tolerance: float) -> LeftVectors:
    """The vectors of `approximate_left`, corrected or found anew where their error asks for it.

    The estimates are those of a typical matrix, and the truth was up to three times as large: they
    have to stay below a third of the tolerance, or half of it after a correction.
    """
    m = x.shape[-2]
    values, vectors, noise = found
    energies = total_energy(x)
    kept, last = values[..., : k + 1], vectors[..., :k]
    error = float(_rounding_error(kept, energies, m, noise).max())
    if error <= tolerance / 3 or x.dtype == torch.float64:
        return LeftVectors(kept, last, error)
    for count in (min(k + max(8, k // 4), vectors.shape[-1]), vectors.shape[-1]):
        error = float(_corrected_error(values[..., : count + 1], energies, k, m, noise).max())
        if error <= tolerance / 2:
            is_steep = bool((kept[..., k - 1] < _STEEP * kept[..., 0]).any())
            kept, last = _corrected(x, vectors[..., :count], k, _STEPS if is_steep else 1)
            break
    else:
        return left_in_double(x, k)
    return LeftVectors(kept.to(x.dtype), last.to(x.dtype), error)


def left_in_double(x: Tensor, k: int) -> LeftVectors:
    """The k leading left singular vectors of fp32 matrices by Gram matrices in fp64.

    What they miss of ``x`` is 1e-8 of its norm, whatever ``k`` is.
    """
    values, vectors, _ = _leading(x, k, torch.float64)
    return LeftVectors(values.to(x.dtype), vectors.to(x.dtype), torch.finfo(x.dtype).eps)


def _corrected(x: Tensor, vectors: Tensor, k: int, steps: int) -> tuple[Tensor, Tensor]:
    """Power steps, on ``x`` itself, and a Rayleigh-Ritz projection in fp64.

    Rounding of the power step costs as much as the condition number of the kept directions, not
    its square: the vectors go in and come out nearly orthogonal, and each is scaled by itself.

    Args:
        x: ``(m, n)``.
        vectors: more than k approximate left singular vectors, ``(m, count)``.
        k: how many to return, and one value more.
        steps: how many; each takes away what eigenvalues differ by.
    """
    rows = vectors.mT
    for _ in range(steps):
        rows = _orthonormal((x @ (rows @ x).mT).mT)
    rows = _orthonormal(rows.double())
    # Blocks of columns are converted one by one, so that no copy of `x` comes about.
    gram = rows.new_zeros(*rows.shape[:-1], rows.shape[-2])
    for columns in x.split(max(256, math.ceil(x.shape[-1] / 4)), dim=-1):
        image = rows @ columns.double()
        gram += image @ image.mT
    values, within = eigh(gram)
    values = values.flip(-1)[..., : k + 1].clamp_min(0)
    return values, rows.mT @ within.flip(-1)[..., :k]


def _orthonormal(rows: Tensor) -> Tensor:
    """Cholesky QR of rows that are nearly orthogonal, of any length."""
    rows = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    factor, _ = torch.linalg.cholesky_ex(rows @ rows.mT)
    return torch.linalg.solve_triangular(factor, rows, upper=False)


def _gram(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Lower triangles of ``x x^T``, above which lies rubbish: 5/8 of the full product's work.

    Blocks of rows are converted to ``dtype`` one by one, so that no copy of ``x`` comes about.
    """
    m = x.shape[-2]
    step = max(256, math.ceil(m / 4))
    gram = x.new_empty(*x.shape[:-1], m, dtype=dtype)
    for i in range(0, m, step):
        rows = x[..., i : i + step, :].to(dtype)
        for j in range(0, i + 1, step):
            columns = rows if i == j else x[..., j : j + step, :].to(dtype)
            gram[..., i : i + step, j : j + step] = rows @ columns.mT
    return gram


def _leading(x: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Leading eigenpairs of the Gram matrices of ``x`` ``(stack, m, n)``, and the solver's noise.

    Noise is the size of rounding errors in units of ``eps * values[0] / sqrt(m)``, as measured.
    """
    m = x.shape[-2]
    gram = _gram(x, dtype)
    partial = _solved_partially(x, k)
    found = [_partial_eigh(matrix, k + 1) for matrix in gram.view(-1, m, m)] if partial else []
    if partial and all(len(values) == k + 1 for values, _ in found):
        values = torch.stack([values for values, _ in found]).view(*x.shape[:-2], k + 1)
        vectors = torch.stack([vectors for _, vectors in found]).view(*x.shape[:-1], k + 1)
        noise = 0.4
    else:
        values, vectors = eigh(_gram(x, dtype) if partial else gram)
        noise = 4.0
    values = values.flip(-1)[..., : k + 1].clamp_min(0)
    if k == m:
        values = torch.cat([values, torch.zeros_like(values[..., :1])], -1)
    return values, vectors.flip(-1)[..., :k], noise


def eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of symmetric matrices ``(stack, m, m)``.

    Only lower triangles are read. LAPACK's divide and conquer, which torch calls, gives up on some
    matrices of which most rows are zero, or returns NaN; its other solvers do not. A GPU's solvers
    run in fp64: see `_on_device`.
    """
    try:
        values, vectors = torch.linalg.eigh(_on_device(gram))
    except LinAlgError:
        return _eigh_otherwise(gram)
    if not bool(values.isfinite().all()):
        return _eigh_otherwise(gram)
    return values.to(gram.dtype), vectors.to(gram.dtype)


def eigvalsh(gram: Tensor) -> Tensor:
    """The eigenvalues of `eigh` alone, at a fraction of its price."""
    try:
        values = torch.linalg.eigvalsh(_on_device(gram))
    except LinAlgError:
        return _eigh_otherwise(gram)[0]
    return values.to(gram.dtype) if bool(values.isfinite().all()) else _eigh_otherwise(gram)[0]


def svd_of_small(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All singular directions of small matrices ``(stack, m, n)``: U, S and Vh.

    On a GPU in fp64: what is true of its eigenproblems (`_on_device`) is true of its SVDs.
    """
    u, s, vh = torch.linalg.svd(_on_device(x), full_matrices=False)
    return u.to(x.dtype), s.to(x.dtype), vh.to(x.dtype)


def _on_device(gram: Tensor) -> Tensor:
    """In the precision that the device's eigensolver needs.

    cuSOLVER's vectors are orthonormal to 1e-5 only in fp32 (torch 2.11, CUDA 13, an H100), which
    costs `truncated_svd` the accuracy that it promises. In fp64 it takes no longer, and below 513
    rows half of the time: its Jacobi solver, which fp32 gets there, is the slower one.
    """
    return gram if gram.device.type == "cpu" else gram.double()


def largest_eigenvalue(gram: Tensor) -> Tensor:
    """The largest eigenvalue alone, ``(stack,)``, of symmetric matrices without negative ones.

    By Lanczos iterations, which take a tenth of the time of all eigenvalues.
    """
    m = gram.shape[-1]
    if gram.device.type != "cpu" or m < _LANCZOS_SIDE:
        return eigvalsh(gram)[..., -1]
    # Of its own generator: a start that is the same everywhere, and orthogonal to nothing.
    start = torch.randn(
        m, generator=torch.Generator().manual_seed(0), device="cpu", dtype=gram.dtype
    ).numpy()
    found = []
    for matrix in gram.reshape(-1, m, m):
        try:
            values = scipy.sparse.linalg.eigsh(
                matrix.numpy(), k=1, which="LA", v0=start, return_eigenvectors=False
            )
            found.append(torch.from_numpy(values)[0].to(gram.dtype))
        except scipy.sparse.linalg.ArpackError:  # of zeros, or too slow
            found.append(eigvalsh(matrix)[-1])
    return torch.stack(found).view(gram.shape[:-2])


def _eigh_otherwise(gram: Tensor) -> tuple[Tensor, Tensor]:
    m = gram.shape[-1]
    found = [
        scipy.linalg.eigh(matrix, lower=True, driver="evr", check_finite=False)
        for matrix in gram.double().cpu().reshape(-1, m, m).numpy()
    ]
    values = torch.stack([torch.from_numpy(values) for values, _ in found])
    vectors = torch.stack([torch.from_numpy(vectors) for _, vectors in found])
    return values.view(gram.shape[:-1]).to(gram), vectors.view(gram.shape).to(gram)


def _solved_partially(x: Tensor, k: int) -> bool:
    m = x.shape[-2]
    return x.device.type == "cpu" and m >= PARTIAL_SIDE and k < _PARTIAL_SHARE * m


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
    size = _rounding(values, m, noise)
    kept, dropped = values[..., :k].double(), values[..., k:].double()
    total = kept.sum(-1)
    mean = ((energies - total).clamp_min(0) / (m - k))[..., None].minimum(dropped)

    def turned(rounding: Tensor, kept: Tensor, dropped: Tensor) -> Tensor:
        gap = (kept - dropped).clamp_min(_SMALLEST)
        # No direction can do more damage than to be lost.
        return (rounding * (kept + dropped) / gap**2).minimum(2 * (kept + rounding.sqrt())).sum(-1)

    near = turned(size**2, kept[..., -1:], dropped)
    far = turned((size / 2) ** 2 * (m - k), kept, mean)
    return torch.where(total > 0, ((near + far) / total).sqrt(), 0.0)


def _rounding(values: Tensor, m: int, noise: float) -> Tensor:
    """Size of rounding between two directions of Gram matrices of size m, ``(stack, 1)``."""
    return noise * torch.finfo(values.dtype).eps * values[..., :1].double() / math.sqrt(m)


def _corrected_error(values: Tensor, energies: Tensor, k: int, m: int, noise: float) -> Tensor:
    """What `_rounding_error` becomes by `_corrected`; infinite where it cannot help.

    The power step multiplies what lies outside the ``count`` vectors by ``d / t`` for eigenvalues
    ``t`` and ``d`` of a kept direction and one outside, and adds rounding of its own; within the
    vectors fp64 leaves nothing.

    Args:
        values: the ``count + 1`` largest eigenvalues.
        energies: sums of all eigenvalues.
        k: number of kept directions.
        m: size of the Gram matrices.
        noise: see `_leading`.
    """
    size = _rounding(values, m, noise)
    kept, first = values[..., :k].double(), values[..., 0].double()
    edge = values[..., -1:].double() + size
    rest = (energies - values[..., :-1].double().sum(-1)).clamp_min(0)[..., None] + size
    # What lies outside has eigenvalues up to the edge: for all of them stands one in between.
    outside = (edge + rest / (m - values.shape[-1] + 1)) / 2
    turned = (kept + outside) * outside * rest / (kept * (kept - outside).clamp_min(_SMALLEST)) ** 2
    far = ((size / 2) ** 2 * turned).sum(-1)
    rounded = k * torch.finfo(values.dtype).eps ** 2 * first
    error = ((far + rounded) / kept.sum(-1)).sqrt()
    # Perturbation theory of the first order has to hold, and the power step needs a direction of
    # each vector.
    noise_level = math.sqrt(m) * size
    sound = (kept - edge > 16 * noise_level).all(-1) & (values[..., -2] > 4 * noise_level[..., 0])
    return torch.where(sound, error, math.inf)
