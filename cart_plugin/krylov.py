"""Block Krylov iteration for the leading singular directions, with an a-posteriori error estimate.

One page of numerics that `lowrank` builds its `fast` solver on. It works on the matrix itself, not
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

from cart_plugin.gram import LeftVectors, leading_left

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
    block = 8 * math.ceil(k / _BLOCKS_PER_RANK / 8)
    limit = int(_MAX_BASIS_SHARE * m) // block
    steps = max(_MIN_STEPS, math.ceil(_FIRST_BASIS * k / block))
    if steps > limit or steps * block <= k:
        return None
    generator = torch.Generator(device=x.device).manual_seed(seed)
    # Rows of `basis` are orthonormal and span the Krylov space; `image` is `basis @ x`.
    start = torch.randn(block, n, generator=generator, device=x.device, dtype=x.dtype)
    rows = _times_transposed(start.expand(stack, block, n), x)
    rows = _orthonormal(rows, rows.norm(dim=-1, keepdim=True), rows[:, :0])
    basis, image = x.new_empty(stack, 0, m), x.new_empty(stack, 0, n)
    energies = torch.linalg.vector_norm(x, dim=2).double().square().sum(1)
    while True:
        basis, image, rows, residual = _extend(x, basis, image, rows, steps)
        # Rayleigh-Ritz: singular vectors of x within the basis.
        ritz = leading_left(image, k, tolerance=tolerance / 4)
        goal = _needed_error(ritz, energies, tolerance)
        if ritz.error > goal.min() / 2:
            ritz = leading_left(image, k, tolerance=float(goal.min()) / 4)
        error = _estimated_error(ritz, image[:, -block:], residual)
        to_go = float((error / goal).max().log())
        if to_go <= 0:
            break
        if not math.isfinite(to_go):
            return None
        # Convergence starts slowly and accelerates; fitted to the spectra of the benchmark.
        steps = math.ceil(to_go * (0.5 + 0.2 * to_go))
        if basis.shape[1] // block + steps > limit:
            return None
    if _misses_direction(x, basis, ritz, generator):
        return None
    return Subspace(basis.mT @ ritz.vectors, ritz.vectors.mT @ image, float(error.max()))


def _extend(
    x: Tensor, basis: Tensor, image: Tensor, rows: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take ``steps`` blocks into the basis, the first of which is ``rows``.

    Returns:
        Basis ``(stack, p, m)``, image ``(stack, p, n)``, the block that would come next
        ``(stack, b, m)``, and the same before it was made orthonormal: what the last block's
        ``x x^T`` has outside the basis.
    """
    block, have = rows.shape[1], basis.shape[1]
    size = have + steps * block
    basis = torch.cat([basis, basis.new_empty(basis.shape[0], size - have, basis.shape[2])], 1)
    image = torch.cat([image, image.new_empty(image.shape[0], size - have, image.shape[2])], 1)
    for p in range(have + block, size + 1, block):
        basis[:, p - block : p] = rows
        torch.matmul(rows, x, out=image[:, p - block : p])
        residual = _times_transposed(image[:, p - block : p], x)
        before = _norms(residual)
        # In exact arithmetic only the last two blocks overlap with the new one.
        residual = _project_out(residual, basis[:, max(0, p - 2 * block) : p])
        rows = _orthonormal(residual, before, basis[:, :p])
    return basis, image, rows, residual


def _orthonormal(rows: Tensor, before: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows that span ``rows`` less what lies in ``basis``; exhausted ones become zero.

    Args:
        rows: ``(stack, b, m)``, roughly orthogonal to the basis.
        before: their norms ``(stack, b, 1)`` before they were made so: what is left of them below
            1e-5 of it is rounding.
        basis: ``(stack, p, m)`` with orthonormal or zero rows.
    """
    norms = _norms(rows)
    rows = torch.where(norms > 1e-5 * before, rows / norms, 0.0)
    # Rounding of a Gram matrix of b rows of length 1.
    shift = 10 * rows.shape[1] * torch.finfo(rows.dtype).eps
    # The shift leaves directions short that are much weaker than the strongest; the second pass
    # brings them to length, and what is short even then is rounding. Whatever is lengthened brings
    # rounding along that lies in the basis: project once more.
    rows = _cholesky_qr(rows, shift)
    rows = _cholesky_qr(_project_out(rows, basis), shift)
    norms = _norms(rows)
    alive = norms > 0.5
    rows = _project_out(torch.where(alive, rows / norms, 0.0), basis)
    return _cholesky_qr(rows, (~alive[..., 0]).to(rows.dtype))


def _cholesky_qr(rows: Tensor, shift: float | Tensor) -> Tensor:
    gram = rows @ rows.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(shift)
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(factor, rows, upper=False)


def _times_transposed(rows: Tensor, x: Tensor) -> Tensor:
    """``rows @ x^T``, in the order that BLAS runs up to twice as fast for few rows."""
    return (x @ rows.mT).mT.contiguous()


def _project_out(rows: Tensor, basis: Tensor) -> Tensor:
    return rows - (rows @ basis.mT) @ basis


def _norms(rows: Tensor) -> Tensor:
    return rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def _needed_error(ritz: LeftVectors, energies: Tensor, tolerance: float) -> Tensor:
    """Relative errors to stop at, ``(stack,)``: ``tolerance``, or less where little is left out.

    The residual's excess energy is at most the squared error times the kept energy.
    """
    kept = ritz.values[:, :-1].double().sum(-1)
    share = (energies - kept).clamp_min(0) / kept
    needed = (_EXCESS * share).sqrt().clamp(2 * _ROUNDING, tolerance)
    return torch.where(kept > 0, needed, tolerance)


def _estimated_error(ritz: LeftVectors, newest: Tensor, residual: Tensor) -> Tensor:
    """Relative errors of the truncated matrices ``(stack,)``, to first order in the residuals.

    A Ritz vector with value ``t`` and residual of norm ``r`` deviates by ``r / (t - d)`` towards
    directions outside the basis that have the eigenvalue ``d``, and that adds
    ``r^2 (t + d) / (t - d)^2`` to the squared error. For ``d`` stands the middle between the
    largest value not kept and the mean over the newest block, which keeps the estimate within a
    factor of three of the truth on all spectra of the benchmark. Rounding adds its part.

    Args:
        ritz: vectors in the basis.
        newest: image of the newest block, ``(stack, b, n)``.
        residual: what its ``x x^T`` has outside the basis, ``(stack, b, m)``.
    """
    k = ritz.vectors.shape[-1]
    kept = ritz.values[:, :k].double()
    quotient = newest.square().sum(-1).mean(-1).double()
    outside = ((ritz.values[:, k] + quotient) / 2)[:, None]
    last = ritz.vectors[:, -residual.shape[1] :]
    residuals = (last.mT @ residual).double().square().sum(-1)
    gap = (kept - outside).clamp_min(torch.finfo(torch.float32).eps * kept[:, :1]).square()
    total = kept.sum(-1)
    squared = (residuals * (kept + outside) / gap).sum(-1) / total
    squared = torch.where(total > 0, squared, 0.0)
    return (squared + ritz.error**2 + _ROUNDING**2).sqrt()


def _misses_direction(
    x: Tensor, basis: Tensor, ritz: LeftVectors, generator: torch.Generator
) -> bool:
    """Whether a direction that should be kept lies outside the basis.

    A Krylov space holds at most a block of vectors of each singular value, so that values repeated
    more often look converged while some of their directions are missing. Two power steps on random
    vectors orthogonal to the basis find those.
    """
    shape = (x.shape[0], _PROBES, x.shape[1])
    probes = torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
    for _ in range(2):
        probes = _project_out(probes, basis)
        probes = _times_transposed((probes / _norms(probes)) @ x, x)
    probes = _project_out(probes, basis)
    outside = ((probes / _norms(probes)) @ x).square().sum(-1).amax(-1)
    rounding = (10 * torch.finfo(x.dtype).eps) ** 2 * ritz.values[:, 0]
    return bool((outside > 0.95 * ritz.values[:, -2] + rounding).any())
