"""Merging models that differ from their base by matrices of low rank, without a dense matrix.

With ``tau_t = B_t A_t`` for B_t ``(m, r_t)`` and A_t ``(r_t, n)``, such as LoRA adapters, every
method here stays in the span of all B_t and all A_t: with orthonormal bases U ``(m, K)`` and V
``(n, K)`` of it, K the sum of the ranks, ``tau_t = U core_t V^T``, and the merged difference from
the base is ``U N V^T``. The base's weights cancel, and all but the bases is done on matrices
``(K, K)`` by what merges whole weights: `informed`, `least_interference`, truncated sums. That
costs ``O((m + n) K^2)`` (such coordinates are the core space of Core Space merging).

**A given rank.** The best matrix of rank r is not the SVD's. What a change X of the merged
difference costs the tasks is ``tr(X G X^T)`` with the metric ``G = sum_t w_t C_t + r I`` of the
objective (`cart_plugin.merging.least_interference`), which is quadratic. So the best N of rank r is
the one nearest in that metric, a reduced-rank regression: for any root ``G = L L^T`` it is
``W W^T N`` with W the r leading left singular vectors of ``N L``. Outside the span G is ``r I``:
nothing is to be found there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cart_plugin.errors import CartError
from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.gram import eigh, svd_of_small, total_energy
from cart_plugin.linalg.precision import full_precision
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import truncated_svd
from cart_plugin.merging.informed import (
    LOW_RANK,
    MOST_INFORMED,
    Change,
    are_of_low_rank,
    few_directions,
    informed_system,
)
from cart_plugin.merging.kept import Kept
from cart_plugin.merging.least_interference import PULL, RIDGE
from cart_plugin.merging.low_rank_changes import combine
from cart_plugin.merging.normal_equations import System
from cart_plugin.merging.settings import CartSettings

# Directions of a basis below this share of the strongest (squared, of factors of length 1) are
# rounding of fp64 or all but: adapters of one start differ by 1e-4 and more.
_LEAST_SQUARE = 1e-12

# Up to so many coordinates fp64 costs next to nothing; beyond, as much as all the rest.
_IN_DOUBLE = 256
_ROWS = 512  # their copy in fp64 stays in the cache


class Difference(NamedTuple):
    """What a model differs by from its base: ``left @ right``.

    Attributes:
        left: ``(stack, m, r)``; a stack of one for a single matrix.
        right: ``(stack, r, n)``.
    """

    left: Tensor
    right: Tensor


class Merged(NamedTuple):
    """A merged difference in the coordinates of its `Span`.

    Attributes:
        total: N, ``(stack, p, q)``.
        metric: G, ``(stack, q, q)``; None where the method has no objective.
    """

    total: Tensor
    metric: Tensor | None


class Span:
    """Orthonormal bases of what several models differ by, and the models in them.

    Attributes:
        shape: ``(stack, m, n)`` of the weights.
        parts: each model's difference, as singular value decompositions in coordinates, in fp64
            where these are few, else in the differences' dtype:
            U ``(stack, p, r)``, Vh ``(stack, r, q)``. p is the sum of the ranks or m, whichever is
            smaller; q likewise.
    """

    def __init__(self, differences: Sequence[Difference]) -> None:
        """Find the bases.

        Args:
            differences: one a model, all of one shape, in one dtype, on a CPU or CUDA device.
        """
        left = torch.cat([part.left for part in differences], dim=-1)
        right = torch.cat([part.right for part in differences], dim=-2)
        self.shape = (left.shape[0], left.shape[1], right.shape[2])
        self._rows, self._columns = _Basis(left), _Basis(right.mT)
        few = max(self._rows.size, self._columns.size) <= _IN_DOUBLE
        dtype = torch.float64 if few else left.dtype
        ranks = [part.left.shape[-1] for part in differences]
        sides = (
            basis.coordinates.to(dtype).split(ranks, dim=-1)
            for basis in (self._rows, self._columns)
        )
        self.parts = [decomposed(*pair) for pair in zip(*sides, strict=True)]

    def mean(self, shares: Sequence[float]) -> Tensor:
        """The weighted mean of the differences, ``(stack, p, q)``."""
        stack, p, q = len(self._rows.coordinates), self._rows.size, self._columns.size
        found = self.parts[0].S.new_zeros(stack, p, q)
        for part, share in zip(self.parts, shares, strict=True):
            if share and part.rank:
                part.add_to_(found, share)
        return found

    def first(self, count: int) -> Span:
        """The first models alone, in the same coordinates."""
        found = copy.copy(self)
        found.parts = self.parts[:count]
        return found

    def inputs(self, columns: Tensor) -> Tensor:
        """What the differences see of inputs ``(n, N)``, in coordinates: ``(stack, q, N)``."""
        if self._columns.size == self.shape[2]:
            return columns.to(self.parts[0].S).expand(self.shape[0], *columns.shape)
        unit = torch.eye(self._columns.size, dtype=torch.float64, device=columns.device)
        basis = self._columns.lifted(unit.expand(self.shape[0], *unit.shape))
        with full_precision(columns.device):
            return (basis.mT.double() @ columns.double()).to(self.parts[0].S)

    def lifted(self, factors: LowRank) -> Difference:
        """Factors in coordinates as those of the weights, in the dtype of the differences.

        Both take the root of the singular values: then both have entries of like size, and
        rounding them costs the least.
        """
        root = factors.S.sqrt()
        left = self._rows.lifted(factors.U * root[..., None, :])
        return Difference(left, self._columns.lifted(factors.Vh.mT * root[..., None, :]).mT)


class _Basis:
    """An orthonormal basis of the span of some columns, from their Gram matrix in fp64.

    A QR decomposition would cost three times as much. What fp64 does to a squared condition number
    is less than fp32 does to the columns. The basis itself is never formed.
    """

    def __init__(self, columns: Tensor) -> None:
        """Find it for ``(stack, m, k)``."""
        self._columns = columns
        m, count = columns.shape[-2:]
        self.size = min(m, count)
        self._map: Tensor | None = None  # from coordinates to coefficients of the columns
        if count >= m:  # the whole space: it has a basis
            self.coordinates = columns.double()
            return
        gram = columns.new_zeros(len(columns), count, count, dtype=torch.float64)
        with full_precision(columns.device):
            for rows in columns.split(_ROWS, dim=-2):
                wide = rows.double()
                gram.baddbmm_(wide.mT, wide)
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        lengths = torch.where(norms > 0, norms, 1)
        gram /= lengths[..., :, None] * lengths[..., None, :]
        root, inverse = _root(gram)
        self.coordinates = root * norms[..., None, :]  # zeros stay zeros
        self._map = inverse / lengths[..., :, None]

    def lifted(self, coordinates: Tensor) -> Tensor:
        """Vectors ``(stack, size, k)`` as ``(stack, m, k)``."""
        if self._map is None:
            return coordinates.to(self._columns.dtype)
        with full_precision(self._columns.device):
            coefficients = (self._map @ coordinates.double()).to(self._columns.dtype)
            return self._columns @ coefficients


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """R with ``gram = R^T R``, and its inverse; of a singular matrix the pseudo-inverse.

    Args:
        gram: a stack, ``(stack, k, k)``, with a diagonal of ones (or zeros).
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    if not bool(failed.any()) and bool((diagonal.square() > _LEAST_SQUARE).all()):
        unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
        return factor.mT, torch.linalg.solve_triangular(factor.mT, unit, upper=True)
    # Ten times as long. Directions that are none are rows of zeros.
    values, vectors = eigh(gram)
    known = values > (_LEAST_SQUARE * values[..., -1:]).clamp_min(0)
    roots = torch.where(known, values, 1).sqrt()
    rows = torch.where(known, roots, 0)[..., :, None] * vectors.mT
    return rows, vectors * torch.where(known, 1 / roots, 0)[..., None, :]


def decomposed(left: Tensor, right: Tensor) -> LowRank:
    """The singular value decomposition of ``left @ right^T``, from factors with few columns.

    Args:
        left: ``(stack, m, r)``.
        right: ``(stack, n, r)``.

    Returns:
        Factors of the smallest of m, n and r directions.
    """
    if left.shape[-1] == 0:
        return LowRank(left, left.new_zeros(len(left), 0), right.mT)
    left_basis, left_rest = torch.linalg.qr(left)
    right_basis, right_rest = torch.linalg.qr(right)
    with full_precision(left.device):
        u, s, vh = svd_of_small(left_rest @ right_rest.mT)
        return LowRank(left_basis @ u, s, vh @ right_basis.mT)


def merge_in_span(
    span: Span,
    shares: Sequence[float],
    settings: CartSettings | None = None,
    *,
    name: str | None = None,
    kept: Kept | None = None,
) -> Merged:
    """Merge models within the span of their differences from one base.

    The same as `cart_plugin.merging.cart.merge_tensors` with the whole weights and the base, less
    the base, up to rounding.

    Args:
        span: of the models' differences.
        shares: one a model: weights that sum to 1.
        settings: as for whole weights, with a rank of ``rank_ratio`` or ``rank`` and no ``center``;
            None for the weighted mean, which is what becomes of tensors that are not decomposed.
        name: of the tensor, for what is counted.
        kept: counts what is kept of the differences from the average, as for whole weights.

    Raises:
        CartError: negative weights where a least-squares sum has no use for them.
    """
    mean = span.mean(shares)
    if settings is None or settings.rule.keeps_nothing:
        return Merged(mean, None)
    _, m, n = span.shape
    counting = [index for index, share in enumerate(shares) if share]
    if settings.lambda_ == "auto" and min(shares) < 0:
        raise CartError("the method auto takes no negative weights; merge with cart or linear")
    weights = [len(shares) * share for share in shares]
    with torch.no_grad(), torch.autocast(mean.device.type, enabled=False):
        parts = [(span.parts[index], weights[index]) for index in counting]
        if settings.lambda_ == "auto":
            return _least_interference(parts, mean, settings, (m, n))
        sums = mean.clone()
        for part, weight in parts:
            centred = part.dense() - mean
            factors = _truncated(centred, settings, (m, n))
            if kept is not None and len(counting) > 2:
                kept.add(name or "", total_energy(centred), factors, None)
            factors.add_to_(sums, settings.lambda_ * weight)
        return Merged(sums, None)


Parts = Sequence[tuple[LowRank, float]]


def _least_interference(
    parts: Parts, mean: Tensor, settings: CartSettings, of: tuple[int, int]
) -> Merged:
    """As `cart_auto`, in all its forms."""
    are_many = settings.looks_for_low_rank(len(parts))
    if not (are_many or settings.is_informed(len(parts))):
        return _centred(parts, mean, settings, of)
    whole = parts
    rank, few = settings.informed.rule.fixed_rank(*of), few_directions(*of)
    if settings.center is not None:  # whole models without a base tell by one of them
        first = parts[0][0].dense()
        rule = RankRule(rank=min(first.shape[-2:]))
        parts = [
            (truncated_svd(part.dense() - first, rule, svd="exact"), weight)
            for part, weight in parts
        ]
        rank = few
    changes = [
        Change(leading(part, rank), part.S[..., :few], weight, *_norms(part))
        for part, weight in parts
    ]
    if are_of_low_rank(changes):
        taus = [change.real().double() for change in changes]
        weights = [weight for _, weight in parts]
        found = combine(taus, weights, of[1], centred=are_many, **LOW_RANK)
        return Merged(mean + found.added.to(mean.dtype), found.metric.to(mean.dtype))
    if are_many:
        return _centred(whole, mean, settings, of)
    system = informed_system(((one.real(), one.weight) for one in changes), mean)
    metric = system.metric()
    total = mean + system.solve()
    if sum(bool((change.energy > 0).any()) for change in changes) < MOST_INFORMED:
        return Merged(total, metric)
    other = _centred(parts, mean, settings, of)
    assert other.metric is not None
    return Merged((total + other.total) / 2, _of_trace_1(metric) + _of_trace_1(other.metric))


def _of_trace_1(metric: Tensor) -> Tensor:
    return metric / metric.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]


def _centred(parts: Parts, mean: Tensor, settings: CartSettings, of: tuple[int, int]) -> Merged:
    """As `least_interference`."""
    total = System(width=of[1])
    for part, weight in parts:
        centred = part.dense() - mean
        if (settings.rule.fixed_rank(*of) or 0) >= min(centred.shape[-2:]):
            total.add_whole(centred, weight)
        else:
            total.add(_truncated(centred, settings, of), weight)
    metric = total.metric(RIDGE)
    return Merged(mean + total.solve(RIDGE, PULL), metric)


def _norms(factors: LowRank) -> tuple[Tensor, Tensor]:
    """Squared norms in fp64, and what of them is rounding: nothing."""
    energy = factors.S.double().square().sum(dim=-1)
    return energy, torch.zeros_like(energy)


def leading(part: LowRank, rank: int | None) -> LowRank:
    """The first directions of factors; all if None."""
    return LowRank(part.U[..., :rank], part.S[..., :rank], part.Vh[..., :rank, :], part.error)


def _truncated(centred: Tensor, settings: CartSettings, of: tuple[int, int]) -> LowRank:
    return truncated_svd(centred, settings.rule, svd=settings.solver, of=of)


def of_rank(merged: Merged, rank: int) -> LowRank:
    """The merged difference at a rank, in coordinates: the nearest in the method's own metric.

    Args:
        merged: by a method.
        rank: at most so many directions.

    Returns:
        Its singular value decomposition. Without a metric the nearest by the sum of squares.
    """
    rule = RankRule(rank=rank)
    if merged.metric is None or rank >= min(merged.total.shape[-2:]):
        return truncated_svd(merged.total, rule, svd="exact")
    with full_precision(merged.total.device):
        root = torch.linalg.cholesky(merged.metric)
        left = truncated_svd(merged.total @ root, rule, svd="exact").U
        # What `exact` returns of the long side is of length 1 and orthogonal up to rounding only.
        left = torch.linalg.qr(left)[0]
        u, s, vh = svd_of_small(left.mT @ merged.total)
        return LowRank(left @ u, s, vh)
