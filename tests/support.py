"""Matrices that are hard to decompose, the formula in double precision, and how far results are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# On matrices this small, threads wait for one another; on a busy machine, for a long time.
torch.set_num_threads(1)

# Relative error that fp32 rounding leaves in any truncated matrix.
ROUNDING = 2e-6


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent normal entries, the same for a seed in every process."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def with_spectrum(
    values: Tensor, m: int, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A matrix ``(m, n)`` with given singular values and random singular vectors."""
    r = min(m, n)
    left = torch.linalg.qr(random(m, r, seed=seed, dtype=torch.float64))[0]
    right = torch.linalg.qr(random(n, r, seed=seed + 1, dtype=torch.float64))[0]
    return ((left * values.double()) @ right.mT).to(dtype)


def power_law(r: int, exponent: float) -> Tensor:
    """Singular values that decay as a power of their number."""
    return torch.arange(1, r + 1, dtype=torch.float64) ** -exponent


def low_rank_plus_noise(r: int) -> Tensor:
    """Ten strong directions over a floor of weak ones that decay slowly."""
    values = 1e-2 * power_law(r, 0.5)
    values[:10] += power_law(min(10, r), 0.5)
    return values


def rank_deficient(r: int, rank: int = 7) -> Tensor:
    """Singular values of which all but a few are zero."""
    return power_law(r, 0.5) * (torch.arange(r) < rank)


def repeated(r: int, multiplicity: int = 12) -> Tensor:
    """Singular values each of which comes many times."""
    values = power_law(math.ceil(r / multiplicity), 1)
    return values.repeat_interleave(multiplicity)[:r]


SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "power-0.5": lambda r: power_law(r, 0.5),
    "power-1": lambda r: power_law(r, 1),
    "power-2": lambda r: power_law(r, 2),
    "low-rank-plus-noise": low_rank_plus_noise,
    "rank-deficient": rank_deficient,
    "repeated": repeated,
    "flat": lambda r: torch.ones(r, dtype=torch.float64),
}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference, relative to what is expected."""
    difference = found.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


class Reference:
    """The singular value decomposition of a matrix, or of each of a stack, in double precision."""

    def __init__(self, x: Tensor) -> None:
        self.U, self.S, self.Vh = torch.linalg.svd(x.double(), full_matrices=False)

    def best(self, k: int) -> Tensor:
        """The best approximation at rank k."""
        return (self.U[..., :k] * self.S[..., None, :k]) @ self.Vh[..., :k, :]

    def separates(self, k: int) -> bool:
        """Whether the k-th and the next singular value differ: the best matrix is unique."""
        if k >= self.S.shape[-1]:
            return True
        gaps = self.S[..., k - 1] - self.S[..., k]
        return bool((gaps > 1e-6 * self.S[..., 0]).all())

    def excess_energy(self, found: Tensor, k: int) -> float:
        """Energy of the residual beyond the least possible at rank k, in units of the latter.

        What fp32 rounding leaves is not counted. Summed over a stack.
        """
        optimal = float(self.S[..., k:].square().sum())
        residual = self.best(self.S.shape[-1]) - found.double()
        excess = float(residual.square().sum()) - optimal
        excess -= ROUNDING**2 * float(self.S.square().sum())
        if excess <= 0:
            return 0.0
        return excess / optimal if optimal > 0 else math.inf


def best_approximation(x: Tensor, k: int) -> Tensor:
    """The truncated SVD of a matrix, or of each of a stack, in double precision."""
    return Reference(x).best(k) if k else torch.zeros_like(x, dtype=torch.float64)


def excess_energy(x: Tensor, found: Tensor, k: int) -> float:
    """See `Reference.excess_energy`."""
    return Reference(x).excess_energy(found, k)


def separated(x: Tensor, k: int) -> bool:
    """See `Reference.separates`."""
    return Reference(x).separates(k)


def cart_formula(
    tensors: Sequence[Tensor],
    k: int,
    *,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """CART of matrices, or of stacks of them, as its equation says, in double precision.

    Args:
        tensors: one a model, ``(m, n)`` or ``(stack, m, n)``.
        k: rank kept.
        scale: lambda.
        weights: one a model, equal if None.
        base: the centre; the weighted mean if None.
    """
    weights = [1.0] * len(tensors) if weights is None else list(weights)
    doubles = [tensor.double() for tensor in tensors]
    total = torch.zeros_like(doubles[0])
    for weight, tensor in zip(weights, doubles, strict=True):
        total += weight * tensor
    centre = total / math.fsum(weights) if base is None else base.double()
    mean_weight = math.fsum(weights) / len(weights)
    merged = centre.clone()
    for weight, tensor in zip(weights, doubles, strict=True):
        merged += scale * weight / mean_weight * best_approximation(tensor - centre, k)
    return merged
