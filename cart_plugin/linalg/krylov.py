"""Block Krylov iteration for the leading singular directions, with an a-posteriori error estimate.

One page of numerics that `svd` builds its `fast` solver on. It works on the matrix itself, not
on its Gram matrix, so that conditioning is not squared: directions down to about 1e-6 of the
largest singular value are found in fp32. Do not use it for many directions (above an eighth of
the short side, LAPACK's partial eigensolver costs less) or for flat spectra at high accuracy (it
says that it has not converged, at the price of a few matrix products).

Method: Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate
singular value decomposition" (NeurIPS 2015), with full reorthogonalisation by Cholesky QR (Fukaya
et al., "Shifted Cholesky QR", SIAM J. Sci. Comput. 42, 2020).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cart_plugin.linalg.gram import (
    Approximation,
    LeftVectors,
    approximate_left,
    refined,
    total_energy,
)

# Small blocks reach a given accuracy with the smallest basis, large ones run faster a column: a
# quarter of k did best, against a third and a half. In whole vector registers.
_BLOCKS_PER_RANK = 4
# Basis at the first test of convergence, in units of k: enough for decaying spectra.
_FIRST_BASIS = 3.25
_MIN_STEPS = 4
# A larger basis costs more than the alternatives.
_MAX_BASIS_SHARE = 0.55
_PROBES = 4
# Relative error that fp32 rounding leaves in any case.
_ROUNDING = 2e-6
# Largest inner product of two rows of an orthonormal basis.
_DEFECT = 1e-5
# Squared singular values this close may be one that is repeated.
_CLUSTER = 0.99
# Energy of the residual beyond the least possible, in units of the latter.
_EXCESS = 1e-4


class Subspace(NamedTuple):
    """An approximation ``left @ right`` of the best rank-k approximations of a stack of matrices.

    Attributes:
        left: orthonormal columns, ``(stack, m, k)``.
        right: ``left^T x``, ``(stack, k, n)``, rows in descending order of norm.
        error: estimated relative error (Frobenius) of the worst of the stack.
    """

    left: Tensor
    right: Tensor
    error: float


def leading_subspace(x: Tensor, k: int, *, tolerance: float, seed: int) -> Subspace | None:
    """The k leading singular directions of each matrix in a stack.

    Args:
        x: ``(stack, m, n)`` with ``m <= n``, fp32 or fp64, entries of moderate size.
        k: number of directions, at least 1.
        tolerance: relative error (Frobenius) of the truncated matrix to stop at.
        seed: of the random start; the generator lives on the device of ``x``.

    Returns:
        The subspace, or None where it has not converged with a basis of a bounded size or where
        the result cannot be trusted (repeated singular values).
    """
    stack, m, n = x.shape
    block = max(8, 8 * math.ceil(k / _BLOCKS_PER_RANK / 8 - 0.15))
    limit = int(_MAX_BASIS_SHARE * m) // block
    steps = max(_MIN_STEPS, math.ceil(_FIRST_BASIS * k / block))
    if steps > limit or steps * block <= k:
        return None
    if stack == 1:
        x = x[0]  # products of plain matrices start sooner
    generator = torch.Generator(device=x.device).manual_seed(seed)
    # Rows of `basis` are orthonormal and span the Krylov space; `image` is `basis @ x`.
    start = torch.randn(block, n, generator=generator, device=x.device, dtype=x.dtype)
    start = start.expand(*x.shape[:-2], block, n)
    rows = times_transposed(start, x)
    basis, image = rows[..., :0, :], start[..., :0, :]
    rows = orthonormal(rows, basis)
    energies = total_energy(x)
    while True:
        basis, image, rows, residual = _extend(x, basis, image, rows, steps)
        if not is_orthonormal(basis):
            basis, image = _repaired(x, basis)
        # Rayleigh-Ritz: singular vectors of x within the basis.
        found = approximate_left(image, k)
        goal = _needed_error(found.values[..., :k], energies, tolerance)
        error = _estimated_error(found, k, image[..., -block:, :], residual)
        to_go = float((error / goal).max().log())
        if to_go <= 0:
            break
        if not math.isfinite(to_go):
            return None
        # Convergence starts slowly and accelerates; fitted to the spectra of the benchmark.
        steps = math.ceil(to_go * (0.5 + 0.2 * to_go))
        if basis.shape[-2] // block + steps > limit:
            return None
    ritz = refined(image, k, found, tolerance=float(goal.min()) / 5)
    if _repeats(ritz.values[..., :k], block) or _misses_direction(x, basis, ritz, generator):
        return None
    error = (error.square().max() + ritz.error**2).sqrt()
    left, right = basis.mT @ ritz.vectors, ritz.vectors.mT @ image
    return Subspace(left.view(stack, m, k), right.view(stack, k, n), float(error))


def _extend(
    x: Tensor, basis: Tensor, image: Tensor, rows: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take ``steps`` blocks into the basis, the first of which is ``rows``.

    Returns:
        Basis ``(p, m)``, image ``(p, n)``, the block that would come next ``(b, m)``, and the same
        before it was made orthonormal: what the last block's ``x x^T`` has outside the basis.
    """
    block, have = rows.shape[-2], basis.shape[-2]
    more = (*rows.shape[:-2], steps * block)
    basis = torch.cat([basis, rows.new_empty(*more, basis.shape[-1])], -2)
    image = torch.cat([image, rows.new_empty(*more, image.shape[-1])], -2)
    for p in range(have + block, have + steps * block + 1, block):
        basis[..., p - block : p, :] = rows
        newest = torch.matmul(rows, x, out=image[..., p - block : p, :])
        # In exact arithmetic only the last two blocks overlap with the new one.
        recent = basis[..., max(0, p - 2 * block) : p, :]
        residual = _project_out_(times_transposed(newest, x), recent)
        rows = orthonormal(residual, basis[..., :p, :])
    return basis, image, rows, residual


def orthonormal(rows: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows ``(b, m)`` that span ``rows`` less what lies in ``basis`` ``(p, m)``.

    Directions of ``rows`` that are exhausted turn into rounding noise of unit length. That does no
    harm in a basis unless it overlaps with it, which `leading_subspace` checks.
    """
    # The first shift, above the rounding of the Gram matrix, leaves directions short that are much
    # weaker than the strongest; the second pass brings them to length. Projected in between, since
    # whatever is lengthened brings rounding along that lies in the basis.
    eps = torch.finfo(rows.dtype).eps
    rows = _cholesky_qr(rows, 10 * rows.shape[-2] * eps)
    return _cholesky_qr(_project_out_(rows, basis), eps)


def _cholesky_qr(rows: Tensor, shift: float) -> Tensor:
    """Cholesky QR with a shift relative to each row's squared norm."""
    gram = rows @ rows.mT
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal.mul_(1 + shift).add_(torch.finfo(rows.dtype).tiny)
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(factor, rows, upper=False)


def is_orthonormal(basis: Tensor) -> bool:
    """Whether the rows of each ``basis`` ``(p, m)`` are, up to rounding; not if any is NaN."""
    overlap = basis @ basis.mT
    overlap.diagonal(dim1=-2, dim2=-1).sub_(1)
    return bool(overlap.abs().amax() < _DEFECT)


def _repaired(x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis that spans ``basis``, and its image; Householder's QR needs no luck.

    Krylov spaces of matrices whose rank is below the size of the basis need it.
    """
    rows = torch.linalg.qr(basis.nan_to_num(0, 0, 0).mT)[0].mT.contiguous()
    return rows, rows @ x


def times_transposed(rows: Tensor, x: Tensor) -> Tensor:
    """``rows @ x^T``, in the order that BLAS runs up to twice as fast for few rows."""
    if x.stride(-1) != 1:
        return rows @ x.mT
    return (x @ rows.mT).mT.contiguous()


def _project_out_(rows: Tensor, basis: Tensor) -> Tensor:
    add_product = Tensor.addmm_ if rows.ndim == 2 else Tensor.baddbmm_
    return add_product(rows, rows @ basis.mT, basis, alpha=-1)


def _norms(rows: Tensor) -> Tensor:
    return rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def _needed_error(kept: Tensor, energies: Tensor, tolerance: float) -> Tensor:
    """Relative errors to stop at, ``(stack,)``: ``tolerance``, or less where little is left out.

    The residual's excess energy is at most the squared error times the kept energy.
    """
    total = kept.double().sum(-1)
    share = (energies - total).clamp_min(0) / total
    needed = (_EXCESS * share).sqrt().clamp(2 * _ROUNDING, tolerance)
    return torch.where(total > 0, needed, tolerance)


def _estimated_error(found: Approximation, k: int, newest: Tensor, residual: Tensor) -> Tensor:
    """Relative errors of the truncated matrices ``(stack,)``, to first order in the residuals.

    A Ritz vector with value ``t`` and residual of norm ``r`` deviates by ``r / (t - d)`` towards
    directions outside the basis that have the eigenvalue ``d``, and that adds
    ``r^2 (t + d) / (t - d)^2`` to the squared error. For ``d`` stands the middle between the
    largest value not kept and the mean over the newest block, which keeps the estimate within a
    factor of three of the truth on all spectra of the benchmark. Rounding adds its part.

    Args:
        found: Ritz vectors in the basis.
        k: how many of them are kept.
        newest: image of the newest block, ``(stack, b, n)``.
        residual: what its ``x x^T`` has outside the basis, ``(stack, b, m)``.
    """
    kept = found.values[..., :k].double()
    quotient = newest.square().sum(-1).mean(-1).double()
    outside = ((found.values[..., k] + quotient) / 2)[..., None]
    # Whether the bases hold all that the matrices have. Not asked on the way: a GPU would wait.
    is_all = (newest.square().sum(-1).amax(-1) <= _noise(found.values)).all()
    last = found.vectors[..., -residual.shape[-2] :, :k]
    residuals = (last.mT @ residual).double().square().sum(-1)
    gap = (kept - outside).clamp_min(torch.finfo(torch.float32).eps * kept[..., :1]).square()
    total = kept.sum(-1)
    squared = (residuals * (kept + outside) / gap).sum(-1) / total
    squared = torch.where((total > 0) & ~is_all, squared, 0.0)
    return (squared + _ROUNDING**2).sqrt()


def _repeats(kept: Tensor, block: int) -> bool:
    """Whether a block of kept values ``(stack, k)`` are equal, or nearly so.

    A Krylov space holds at most a block of directions of one singular value. Where it has that
    many, there may be more, which look as if they did not exist.
    """
    if kept.shape[-1] < block:
        return False  # any of the equal ones will do
    first, last = kept[..., : kept.shape[-1] - block + 1], kept[..., block - 1 :]
    return bool(((last > _CLUSTER * first) & (last > _noise(kept)[..., None])).any())


def _noise(values: Tensor) -> Tensor:
    """Squared singular values that are rounding, ``(stack,)``."""
    return (10 * torch.finfo(values.dtype).eps) ** 2 * values[..., 0]


def _misses_direction(
    x: Tensor, basis: Tensor, ritz: LeftVectors, generator: torch.Generator
) -> bool:
    """Whether a direction that should be kept lies outside the basis.

    Two power steps on random vectors orthogonal to it find one that stands out from the others
    there.
    """
    shape = (*x.shape[:-2], _PROBES, x.shape[-2])
    probes = torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
    for _ in range(2):
        probes = times_transposed(_outside(probes, basis) @ x, x)
    outside = (_outside(probes, basis) @ x).square().sum(-1).amax(-1)
    return bool((outside > 0.95 * ritz.values[..., -2] + _noise(ritz.values)).any())


def _outside(probes: Tensor, basis: Tensor) -> Tensor:
    """Unit vectors of what the probes have outside the basis; zero where that is rounding."""
    rounding = 100 * torch.finfo(probes.dtype).eps * _norms(probes)
    probes = _project_out_(probes, basis)
    probes = torch.where(_norms(probes) > rounding, probes / _norms(probes), 0.0)
    return _project_out_(probes, basis)
