"""The solvers that are compared: cart_plugin's own, and those that people use instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cart_plugin import RankRule, truncated_svd

# A singular vector more costs little and gives the randomised solvers most of their accuracy;
# scikit-learn's default.
_OVERSAMPLING = 10


@dataclass(frozen=True)
class Factors:
    """``u diag(s) vh``, and the solver's own estimate of its relative error, if it has one."""

    u: Tensor
    s: Tensor
    vh: Tensor
    estimate: float | None = None


def _cart(name: str) -> Callable[[Tensor, int], Factors]:
    def solve(x: Tensor, k: int) -> Factors:
        found = truncated_svd(x, RankRule(rank=k), svd=name, seed=0)
        return Factors(found.U, found.S, found.Vh, found.error)

    return solve


def full_svd(x: Tensor, k: int) -> Factors:
    """Of all directions the first k."""
    u, s, vh = torch.linalg.svd(x.float(), full_matrices=False)
    return Factors(u[:, :k], s[:k], vh[:k])


def _lowrank(niter: int) -> Callable[[Tensor, int], Factors]:
    def solve(x: Tensor, k: int) -> Factors:
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(x.float(), q=min(k + _OVERSAMPLING, *x.shape), niter=niter)
        return Factors(u[:, :k], s[:k], v[:, :k].mT)

    return solve


def svds(x: Tensor, k: int) -> Factors:
    import scipy.sparse.linalg

    start = torch.randn(min(x.shape), generator=torch.Generator().manual_seed(0))
    u, s, vh = scipy.sparse.linalg.svds(x.numpy(), k=k, v0=start.numpy())
    return _from_numpy(u[:, ::-1], s[::-1], vh[::-1])


def randomized_svd(x: Tensor, k: int) -> Factors:
    from sklearn.utils.extmath import randomized_svd  # type: ignore[import-untyped]

    u, s, vh = randomized_svd(x.numpy(), k, n_oversamples=_OVERSAMPLING, random_state=0)
    return _from_numpy(u, s, vh)


def _from_numpy(*arrays: Any) -> Factors:
    u, s, vh = (torch.from_numpy(array.copy()) for array in arrays)
    return Factors(u, s, vh)


FULL = "torch.linalg.svd"
SOLVERS: dict[str, Callable[[Tensor, int], Factors]] = {
    FULL: full_svd,
    "exact": _cart("exact"),
    "fast": _cart("fast"),
    "auto": _cart("auto"),
    "svd_lowrank, niter 2": _lowrank(2),
    "svd_lowrank, niter 4": _lowrank(4),
    "svds": svds,
    "randomized_svd": randomized_svd,
}
CUDA_SOLVERS = {
    name: solver for name, solver in SOLVERS.items() if solver not in (svds, randomized_svd)
}
