"""How fine-tuned weights get in each other's way: the quantities of CART's theory, from factors.

For differences ``D_1 .. D_T`` of one weight from a centre C (the average, or the base model for the
uncentred ones), with ``D_t = U_t S_t V_t^T`` and ``SVD_k`` for the k leading directions, the paper
(arXiv 2412.12153, section 3) weighs two quantities against each other ::

    R(k) = sum_t ||D_t - SVD_k(D_t)||_F^2                            what truncation leaves out
    I(k) = sum_{i != j} ||(N_i V_i^T) (N_j V_j^T)^T||_F              what row spaces have in common

with ``N_t = S_t / ||S_t||_F`` of the k leading singular values. What a merged weight M costs is
the task interference ``L = sum_t ||(M - W_t) X_t||_F^2``, for X_t with an input of task t a column.

**The bound.** The paper's Theorem 1 bounds L through I. Here it is with its constants, for the sums
``M = C + lambda * sum_t SVD_k(D_t)``, of which CART and truncated task arithmetic are two.

*Assumption*: inputs lie near the leading rows of their own difference, ``X_t = V_t N_t A_t + E_t``
for the k leading directions, with a matrix A_t of operator norm ``a_t`` and a rest E_t of norm
``e_t = ||E_t||_F`` orthogonal to them. (Gradient descent adds ``g x^T`` to a weight for each input
x, so that rows of D_t are sums of inputs, and the strong ones of many.) Any inputs can be written
so (`fit_inputs`); the assumption is that ``e_t`` is small and ``a_t`` not large.

*Derivation*: ``W_t = C + D_t``, so that ``(M - W_t) X_t`` is the sum of

1. ``lambda SVD_k(D_j) X_t`` for each other j. On the first part of X_t it is
   ``lambda U_j S_j V_j^T V_t N_t A_t``, whose norm is at most ``lambda s_j I_jt a_t``, where
   ``s_j = ||S_j||_F`` and ``I_jt`` is the term of I(k): an orthogonal factor does not change a
   norm, and ``||B A|| <= ||B||_F ||A||_op``. On the rest at most ``lambda ||S_j||_op e_t``.
2. ``(lambda - 1) SVD_k(D_t) X_t``: of the first part at most ``|lambda - 1| s_t I_tt a_t``, with
   ``I_tt = ||N_t^2||_F``; of the rest, which is orthogonal to V_t, nothing.
3. ``(SVD_k(D_t) - D_t) X_t``: of the first part nothing, since the directions left out are
   orthogonal to V_t; of the rest at most ``r_t e_t``, with ``r_t`` the norm of what is left out.

The triangle inequality adds them up ::

    sqrt(L_t) <= a_t (lambda sum_{j != t} s_j I_jt + |1 - lambda| s_t I_tt)
                 + e_t (lambda sum_{j != t} ||S_j||_op + r_t)

For lambda 1 and inputs within the rows (``e_t = 0``) that is ``L <= (max a_t s_j)^2 I(k)^2``: the
interference alone counts. Where inputs leave the rows, ``sum_t r_t^2 = R(k)`` does: a small rank
keeps I low, a large one R.

Data-free stand-ins for the inputs are ``X_t = V_t N_t``, those that training left in the weights:
then ``a_t = 1`` and ``e_t = 0`` (`cart_plugin.merging.span_measures.answers` judges merges by
them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.precision import full_precision

_ROUNDING = 1e-12  # of squared singular values, in fp64: below, a direction is none


def reconstruction_errors(
    parts: Sequence[LowRank], energies: Tensor, ranks: Sequence[int]
) -> Tensor:
    """R(k) for several k, summed over the models and a stack.

    Args:
        parts: a model's difference each, ``(stack, m, K)`` and so on.
        energies: their squared Frobenius norms, ``(T, stack)``, in fp64: the parts may be
            truncated.
        ranks: the k; above K all that is left out is known of no k, and that of K is returned.

    Returns:
        ``(len(ranks),)`` in fp64, on the CPU. Relative ones are these over ``energies.sum()``.
    """
    left = torch.zeros(len(ranks), dtype=torch.float64, device="cpu")
    for part, energy in zip(parts, energies, strict=True):
        held = _leading_sums(part.S, ranks)  # (len(ranks), stack)
        left += (energy.cpu() - held).clamp_min(0).sum(dim=1)
    return left


def pair_interferences(parts: Sequence[LowRank], ranks: Sequence[int]) -> Tensor:
    """``I_ij(k) = ||N_i V_i^T V_j N_j||_F`` for all pairs and several k, from one product a pair.

    Args:
        parts: a model's difference each, ``(stack, m, K)``; K may differ.
        ranks: the k; above a part's K it is taken whole.

    Returns:
        ``(len(ranks), stack, T, T)`` in fp64, on the CPU; ``||N_i^2||_F`` on the diagonal, zero
        for a model that does not differ.
    """
    count, stack = len(parts), parts[0].S.shape[0]
    found = torch.zeros(len(ranks), stack, count, count, dtype=torch.float64, device="cpu")
    sizes = [_leading_sums(part.S, ranks) for part in parts]  # squared, (len(ranks), stack)
    for i, one in enumerate(parts):
        for j in range(i, count):
            other = parts[j]
            if one.rank == 0 or other.rank == 0:
                continue
            with full_precision(one.S.device):
                products = one.Vh @ other.Vh.mT
            products = products.mul_(one.S[..., :, None]).mul_(other.S[..., None, :]).square_()
            sums = products.double().cumsum(dim=-1).cumsum(dim=-2).cpu()
            for index, rank in enumerate(ranks):
                if rank == 0:
                    continue
                held = sums[:, min(rank, one.rank) - 1, min(rank, other.rank) - 1]
                scale = sizes[i][index] * sizes[j][index]
                value = torch.where(scale > 0, held / torch.where(scale > 0, scale, 1), 0).sqrt()
                found[index, :, i, j] = found[index, :, j, i] = value
    return found


def interference(pairs: Tensor) -> Tensor:
    """I(k) from `pair_interferences`, as the mean over a stack: ``(len(ranks),)``.

    ``T (T - 1)`` times at most 1: models of one and the same direction.
    """
    diagonal = pairs.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return (pairs.sum(dim=(-2, -1)) - diagonal).mean(dim=1)


def effective_rank(squares: Tensor, energy: Tensor, full: int) -> Tensor:
    """In how many directions of equal strength a matrix would have as concentrated a spectrum.

    ``(sum s^2)^2 / sum s^4``, the participation ratio: 1 for one direction, the full rank for a
    flat spectrum, little moved by a tail of rounding.

    Args:
        squares: leading squared singular values, ``(..., K)``, in fp64.
        energy: squared Frobenius norms, ``(...)``.
        full: ``min(m, n)``. What the leading values lack of the energy is taken to be spread evenly
            over the directions that are left: exact where K is all, and else an upper bound.

    Returns:
        ``(...)``; 0 for a matrix of zeros.
    """
    rest = (energy - squares.sum(dim=-1)).clamp_min(0)
    fourth = squares.square().sum(dim=-1) + rest.square() / max(full - squares.shape[-1], 1)
    return torch.where(energy > 0, energy.square() / torch.where(energy > 0, fourth, 1), 0)


def cancellation(inner: Tensor, weights: Sequence[float] | None = None) -> float:
    """rho: how much of them a sum of differences keeps.

    ``||sum_t w_t D_t||^2 / sum_t w_t ||D_t||^2``.

    Args:
        inner: inner products of the (truncated) differences, ``(T, T)``.
        weights: w, of mean 1; None for ones.

    Returns:
        For weights of 1: 0 for differences that cancel, 1 for orthogonal ones, T for equal ones.
        0 where there are none.
    """
    ones = [1.0] * len(inner)
    own = inner.new_tensor(ones if weights is None else weights)
    total = float(own @ inner.diagonal())
    return max(float(own @ inner @ own), 0.0) / total if total > 0 else 0.0


def stand_in_inputs(part: LowRank) -> Tensor:
    """``V_t N_t``, what stands for the inputs of a task where there are none: ``(stack, n, K)``."""
    size = torch.linalg.vector_norm(part.S, dim=-1, keepdim=True)
    return part.Vh.mT * (part.S / torch.where(size > 0, size, 1))[..., None, :]


def task_interferences(errors: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """``L_t = ||(M - W_t) X_t||_F^2`` for any merged weight M.

    Args:
        errors: ``M - W_t``, one a model, ``(..., m, n)``.
        inputs: X_t, one input a column, ``(..., n, N_t)``.

    Returns:
        ``(T,)`` in fp64; L is their sum.
    """
    found = torch.zeros(len(errors), dtype=torch.float64, device="cpu")
    for index, (error, columns) in enumerate(zip(errors, inputs, strict=True)):
        with full_precision(error.device):
            answer = error @ columns.to(error)
        found[index] = torch.linalg.vector_norm(answer, dtype=torch.float64).square()
    return found


class Fit(NamedTuple):
    """How near inputs are to the leading rows of a difference; see the module.

    Attributes:
        reach: ``a_t``, the operator norm of the coefficients.
        rest: ``e_t``, the norm of what lies outside.
    """

    reach: float
    rest: float


def fit_inputs(part: LowRank, inputs: Tensor) -> Fit:
    """Write inputs as ``X = V N A + E`` for all directions of a part that are above rounding.

    Args:
        part: the leading k directions of one difference, ``(m, k)`` and so on.
        inputs: X, ``(n, N)``.
    """
    values = part.S.double()
    real = values.square() > _ROUNDING * values.square().sum()
    rows, columns = part.Vh.double()[real], inputs.double()
    if not len(rows):
        return Fit(0.0, float(torch.linalg.vector_norm(columns)))
    with full_precision(columns.device):
        along = rows @ columns
        rest = torch.linalg.vector_norm(columns - rows.mT @ along)
        shares = values[real] / torch.linalg.vector_norm(values[real])
        reach = torch.linalg.matrix_norm(along / shares[:, None], ord=2)
    return Fit(float(reach), float(rest))


def interference_bound(
    parts: Sequence[LowRank],
    energies: Tensor,
    lambda_: float = 1.0,
    fits: Sequence[Fit] | None = None,
) -> Tensor:
    """What each task's interference is at most, for ``M = C + lambda * sum_t SVD_k(D_t)``.

    Args:
        parts: ``SVD_k(D_t)``, one a model, ``(m, k)`` and so on.
        energies: ``||D_t||_F^2``, ``(T,)``.
        lambda_: at least 0.
        fits: of the tasks' inputs (`fit_inputs`); those of `stand_in_inputs` if None.

    Returns:
        ``(T,)`` in fp64: the bounds of `task_interferences`.
    """
    fits = [Fit(1.0, 0.0)] * len(parts) if fits is None else list(fits)
    stacks = [LowRank(part.U[None], part.S[None], part.Vh[None]) for part in parts]
    pairs = pair_interferences(stacks, [max(part.rank for part in parts)])[0, 0]
    values = [part.S.double().cpu() for part in parts]
    sizes = torch.stack([torch.linalg.vector_norm(one) for one in values])
    largest = torch.stack([one.max() if len(one) else one.sum() for one in values])
    left = (energies.double().cpu() - sizes.square()).clamp_min(0).sqrt()
    own = sizes * pairs.diagonal()
    within = lambda_ * (sizes @ pairs - own) + abs(1 - lambda_) * own
    outside = lambda_ * (largest.sum() - largest) + left
    reach = torch.tensor([fit.reach for fit in fits], dtype=torch.float64, device="cpu")
    rest = torch.tensor([fit.rest for fit in fits], dtype=torch.float64, device="cpu")
    return (reach * within + rest * outside).square()


def _leading_sums(values: Tensor, ranks: Sequence[int]) -> Tensor:
    """Sums of the leading squared singular values, ``(len(ranks), stack)``, in fp64 on the CPU."""
    sums = torch.nn.functional.pad(values.double().cpu().square().cumsum(dim=-1), (1, 0))
    most = values.shape[-1]
    return torch.stack([sums[..., min(rank, most)] for rank in ranks])
