"""Truncated singular value decompositions: one function and a table of its solvers.

Everything here works on matrices ``(m, n)`` or stacks of them ``(stack, m, n)`` on whatever device
they live on, computes in fp32 (fp64 for fp64 inputs), leaves its inputs alone and is deterministic
for a given seed and thread count.

Solvers (`SOLVERS`): ``exact`` takes leading eigenvectors of the Gram matrix of the short side,
``fast`` is a block Krylov iteration (`cart_plugin.linalg.krylov`) with an error estimate that falls
back to ``exact`` when it does not converge, ``auto`` picks one by shape, rank and device.
``subspace`` (`cart_plugin.linalg.subspace`) captures nearly the energy of the best directions, not
these themselves; ``sketch`` is the same with a step or two less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cart_plugin.errors import CartError
from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.gram import leading_left, left_in_double, total_energy
from cart_plugin.linalg.krylov import leading_subspace
from cart_plugin.linalg.precision import full_precision
from cart_plugin.linalg.rules import SHARE_OF_NUMERICAL_RANK, RankRule, numerical_ranks
from cart_plugin.linalg.spectra import energy_rank_of
from cart_plugin.linalg.subspace import GAIN, SKETCH_GAIN, near_subspace, oversampled
from cart_plugin.linalg.threads import SIDE_BY_SIDE, side_by_side, worth

# Relative errors (Frobenius) of the truncated matrix in fp32: what `exact` promises, and what
# `fast` stops at, half of the 1e-3 that it promises.
EXACT_TOLERANCE = 1e-5
FAST_TOLERANCE = 5e-4

# Above this share of the short side the Gram matrix saves little over the full SVD.
_GRAM_SHARE = 0.6

# Where `fast` beats `exact` (`make bench-solvers`): few directions of large matrices, not too wide.
_FAST_SHARE = 1 / 8
_FAST_ASPECT = 6
_FAST_SIDE = 512
# On accelerators, where many small steps take longer than one large eigenproblem.
_FAST_SIDE_THERE = 1536

# Share of the short side that subspace iteration may work on.
_SUBSPACE_SHARE = 0.5


def truncated_svd(
    x: Tensor,
    rule: RankRule,
    *,
    svd: str = "auto",
    seed: int = 0,
    of: tuple[int, int] | None = None,
    rounding: Tensor | None = None,
) -> LowRank:
    """The best approximation of a matrix at the rank that a rule asks for.

    Args:
        x: ``(m, n)`` or ``(stack, m, n)``, floating point, finite. Not modified.
        rule: how many directions to keep. With ``energy`` and ``of_numerical_rank``, each matrix of
            a stack has its own rank; ``S`` and ``Vh`` are then padded with zeros to the largest.
        svd: name of a solver, one of `SOLVERS`.
        seed: start of the randomised solvers.
        of: shape of the matrices that ``x`` holds in fewer coordinates, if it does: ``rank_ratio``
            is a share of their full rank.
        rounding: what of the squared norm of each matrix is rounding (`rounding_energy`),
            ``(stack,)`` in fp64: not counted for a numerical rank. None for nothing.

    Returns:
        The factors, in fp32 (fp64 if ``x`` is fp64), on the device of ``x``. Where the k-th and the
        next singular value (almost) coincide, there are several best approximations: one of them.

    Raises:
        CartError: ``x`` is not a matrix or a stack of them, ``rule`` is no rule, or ``svd`` names
            no solver.
    """
    if x.ndim not in (2, 3):
        raise CartError(f"truncated_svd takes matrices, got a tensor of shape {tuple(x.shape)}")
    if not isinstance(rule, RankRule):
        raise CartError(f"rule must be a RankRule, such as RankRule(rank=8), got {rule!r}")
    if svd not in SOLVERS:
        raise CartError(f"svd must be one of {', '.join(SOLVERS)}, got {svd!r}")
    if x.device.type == "mps":  # it has no fp64, which the solvers need for their estimates
        rounding = None if rounding is None else rounding.cpu()
        found = truncated_svd(x.cpu(), rule, svd=svd, seed=seed, of=of, rounding=rounding)
        return found.to(x.device)
    with torch.no_grad():
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        # One orientation inside: a stack whose rows are the short side.
        tall = x.shape[-2] > x.shape[-1]
        stack = x if x.ndim == 3 else x[None]
        with full_precision(x.device):
            turned = stack.mT if tall else stack
            factors = _scaled(turned, rule, SOLVERS[svd], seed, of, rounding)
        factors = factors.mT if tall else factors
        if x.ndim == 3:
            return factors
        return LowRank(factors.U[0], factors.S[0], factors.Vh[0], factors.error)


Solver = Callable[[Tensor, int, int], LowRank]


def _scaled(
    x: Tensor,
    rule: RankRule,
    solver: Solver,
    seed: int,
    of: tuple[int, int] | None,
    rounding: Tensor | None,
) -> LowRank:
    """Solve with entries of moderate size: squares of very small or large ones leave fp32.

    Each matrix of a stack by itself: one may be a trillion times smaller than the others.
    """
    m, n = x.shape[1:]
    k = rule.fixed_rank(*(of or (m, n)))
    k = None if k is None else min(k, m, n)
    if k == 0 or x.numel() == 0:
        return _zeros(x, 0)
    low, high = (x if x.is_contiguous() else x.mT).flatten(1).aminmax(dim=1)
    largest = torch.maximum(-low, high).tolist()
    if not any(largest):
        return _zeros(x, k or 1)
    # fp32 holds the powers from -126 to 127; a matrix of zeros has none.
    exponents = [min(max(math.frexp(entry)[1], -126), 126) for entry in largest]
    moved = [exponent for exponent, entry in zip(exponents, largest, strict=True) if entry]
    if max(map(abs, moved)) > 20 or max(moved) - min(moved) > 10:
        powers = x.new_tensor([2.0**exponent for exponent in exponents])
        rounding = None if rounding is None else rounding / powers.double().square()
        scaled = _scaled(x / powers[:, None, None], rule, solver, seed, of, rounding)
        return LowRank(scaled.U, scaled.S * powers[:, None], scaled.Vh, scaled.error)
    if k is not None:
        factors = solver(x, k, seed)
        return (
            share_of_rank(factors, total_energy(x), rounding) if rule.of_numerical_rank else factors
        )
    assert rule.energy is not None
    ranks = [energy_rank_of(matrix, rule.energy) for matrix in x]
    return _cut(solver(x, max(ranks), seed), ranks)


def _zeros(x: Tensor, k: int) -> LowRank:
    stack, m, n = x.shape
    return LowRank(x.new_zeros(stack, m, k), x.new_zeros(stack, k), x.new_zeros(stack, k, n))


def share_of_rank(factors: LowRank, totals: Tensor, rounding: Tensor | None) -> LowRank:
    """Of matrices of low numerical rank a share of it, of others all that was solved for.

    Args:
        factors: what a rule with `RankRule.of_numerical_rank` keeps of matrices of full rank, of a
            stack. Not modified.
        totals: squared norms of the matrices, ``(stack,)`` in fp64.
        rounding: as in `truncated_svd`.
    """
    m, n = factors.U.shape[-2], factors.Vh.shape[-1]
    found = numerical_ranks(factors.S, totals, rounding, m, n)
    ranks = [
        factors.rank if rank is None else max(1, math.floor(SHARE_OF_NUMERICAL_RANK * rank))
        for rank in found
    ]
    most = max(ranks)
    u, s, vh = factors.U[..., :most], factors.S[:, :most], factors.Vh[:, :most]
    return _cut(LowRank(u, s.clone(), vh.clone(), factors.error), ranks)


def _cut(factors: LowRank, ranks: list[int]) -> LowRank:
    """Set what a matrix of the stack has beyond its own rank to zero."""
    for index, rank in enumerate(ranks):
        factors.S[index, rank:] = 0
        factors.Vh[index, rank:] = 0
    return factors


def _auto(x: Tensor, k: int, seed: int) -> LowRank:
    """``fast`` where it pays, else ``exact``, for ``x`` ``(stack, m, n)``, ``m <= n``.

    ``fast`` pays for up to an eighth of the full rank. Small matrices, and on CPUs wide ones, go to
    ``exact`` all the same: one eigenproblem takes less than many small steps. So do large shares of
    large matrices, but at the accuracy of ``fast``: to correct what fp32 does to a Gram matrix
    costs more than all the rest.
    """
    m, n = x.shape[1:]
    few = k <= _FAST_SHARE * m
    if x.device.type == "cpu":
        pays = m >= _FAST_SIDE and n < _FAST_ASPECT * m
    else:
        pays = m >= _FAST_SIDE_THERE
    if not pays:
        return _exact(x, k, seed)
    return _fast(x, k, seed) if few else _by_gram(x, k, FAST_TOLERANCE)


def _fast(x: Tensor, k: int, seed: int) -> LowRank:
    """Relative error at most 1e-3 for ``x`` ``(stack, m, n)``, ``m <= n``, or what `exact` gives.

    On CPUs the matrices of a stack are solved by themselves, since batched products gain nothing
    there; on accelerators all at once.
    """
    stack = x.shape[0]
    if stack == 1 or x.device.type != "cpu":
        found = leading_subspace(x, k, tolerance=FAST_TOLERANCE, seed=seed)
        if found is not None:
            return _from_left(found.left, found.right, found.error)
        if stack == 1:
            return _exact(x, k, seed)
    # Also where one matrix of a stack keeps all others from being solved together.
    return _by_themselves(lambda part: _fast(part, k, seed), x)


def _subspace(x: Tensor, k: int, seed: int) -> LowRank:
    """Directions that capture nearly as much energy as the best for ``x`` ``(stack, m, n)``.

    Small matrices, on CPUs, and nearly all directions are solved like ``exact`` and ``auto`` do.
    """
    if x.device.type == "cpu" and x.shape[1] < _FAST_SIDE:
        return _exact(x, k, seed)
    return _iterated(x, k, seed, GAIN)


def _sketch(x: Tensor, k: int, seed: int) -> LowRank:
    """As ``subspace``, stopped earlier; the fewer steps pay on small matrices, too."""
    return _iterated(x, k, seed, SKETCH_GAIN)


def _iterated(x: Tensor, k: int, seed: int, gain: float) -> LowRank:
    stack, m, _ = x.shape
    if oversampled(k) > _SUBSPACE_SHARE * m:
        return _by_gram(x, k, FAST_TOLERANCE)
    if stack > 1 and x.device.type == "cpu":
        return _by_themselves(lambda part: _iterated(part, k, seed, gain), x)
    found = near_subspace(x, k, seed=seed, gain=gain)
    return _from_left(found.left, found.right, found.error)


def _exact(x: Tensor, k: int, _seed: int) -> LowRank:
    """LAPACK-accurate factors of ``x`` ``(stack, m, n)``, ``m <= n``.

    The error is at most 1e-5 in fp32 where LAPACK's own is: not for singular values k and k + 1
    that are closer than rounding can tell apart.

    The leading eigenvectors of ``x x^T`` cost a fraction of the full SVD, which is less accurate,
    too, where singular values are close: it has fp32 only. The product squares the condition
    number; where fp32 cannot separate the kept directions from the rest any more, it is formed in
    fp64 (`cart_plugin.linalg.gram`).
    """
    return _by_gram(x, k, EXACT_TOLERANCE)


def _by_gram(x: Tensor, k: int, tolerance: float) -> LowRank:
    m = x.shape[1]
    # Whatever the error of the vectors, products with them are rounded.
    rounding = 10 * torch.finfo(x.dtype).eps
    is_most = k > _GRAM_SHARE * m
    if is_most and (x.device.type == "cpu" or x.dtype == torch.float64):
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return LowRank(u[..., :k].contiguous(), s[:, :k], vh[:, :k].contiguous(), rounding)

    # cuSOLVER's SVD leaves 2e-4 to 5e-4 in fp32 (`make bench-gpu`).
    leading = left_in_double if is_most else partial(leading_left, tolerance=tolerance)

    def solve(matrix: Tensor) -> LowRank:
        found = leading(matrix, k)
        return _from_left(found.vectors, found.vectors.mT @ matrix, max(found.error, rounding))

    return solve(x) if len(x) == 1 else _by_themselves(solve, x)


def _from_left(left: Tensor, right: Tensor, error: float) -> LowRank:
    """Factors from singular vectors ``left`` ``(stack, m, k)`` of x, and ``right = left^T x``."""
    s = torch.linalg.vector_norm(right, dim=-1)
    return LowRank(left, s, right / s.clamp_min(torch.finfo(s.dtype).tiny)[..., None], error)


def _by_themselves(solve: Callable[[Tensor], LowRank], x: Tensor) -> LowRank:
    """A solver's factors of each matrix of a stack; on CPUs several are solved at a time."""
    _, m, n = x.shape
    if x.device.type == "cpu":
        parts = list(side_by_side(solve, x.split(1), SIDE_BY_SIDE // (m * n), worth(m, n)))
    else:
        parts = [solve(part) for part in x.split(1)]
    return LowRank(
        torch.cat([part.U for part in parts]),
        torch.cat([part.S for part in parts]),
        torch.cat([part.Vh for part in parts]),
        max(part.error for part in parts),
    )


SOLVERS: dict[str, Solver] = {
    "auto": _auto,
    "exact": _exact,
    "fast": _fast,
    "subspace": _subspace,
    "sketch": _sketch,
}
