"""What the solvers promise, and whether they keep it."""

from __future__ import annotations

import torch
from torch import Tensor

from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import SOLVERS, truncated_svd
from tests.devices import CHOSEN
from tests.support import Reference, relative_error

# `sketch` promises an energy only, and `subspace` more on small matrices, which it solves on CPUs.
_ENERGETIC = ("sketch",) if CHOSEN == "cpu" else ("sketch", "subspace")
ACCURATE = [name for name in SOLVERS if name not in _ENERGETIC]
EXACT_BAR, FAST_BAR = 1e-5, 1e-3  # what the solvers promise: relative error (Frobenius)


def is_accurate(x: Tensor, k: int, svd: str, reference: Reference | None = None) -> LowRank:
    """Assert that a solver gives the truncated matrix, or one that is as good."""
    reference = reference or Reference(x)
    before = x.clone()
    factors = truncated_svd(x, RankRule(rank=k), svd=svd)
    assert torch.equal(x, before)
    assert factors.rank == k
    assert factors.U.shape == (*x.shape[:-1], k)
    assert factors.Vh.shape == (*x.shape[:-2], k, x.shape[-1])
    dense = factors.dense()
    bar = EXACT_BAR if svd == "exact" else FAST_BAR
    if reference.separates(k):
        assert relative_error(dense, reference.best(k)) <= bar, (svd, k)
    assert reference.excess_energy(dense, k) <= 1e-4, (svd, k)
    steps = factors.S.diff(dim=-1)
    assert float(steps.max() if k > 1 else 0) <= 1e-6 * float(factors.S.max())
    assert float(factors.S.min()) >= 0
    return factors
