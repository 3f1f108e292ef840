"""How much of the models' differences a merge keeps: nearly all of them sum to nearly nothing.

Centred task vectors sum to zero, so that CART around the average does something by leaving a part
of each out. Differences of low rank, such as adapters', are soon kept whole.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cart_plugin.linalg.factors import LowRank
from cart_plugin.linalg.rounding import rounding_beyond, rounding_that_tells
from cart_plugin.linalg.rules import NEARLY_ALL, numerical_ranks

# Of tensors that no model changed, the average leaves rounding, which has no low rank. Relative to
# the largest squared norm of a tensor's differences.
_ROUNDING = 1e-8
_LOG = logging.getLogger(__name__)


@dataclass
class _Tensor:
    kept: float = 0.0  # squared norms, summed over the models
    total: float = 0.0
    ranks: frozenset[int] = frozenset()  # numerical ranks, as far as they are known

    @property
    def is_whole(self) -> bool:
        return self.kept >= NEARLY_ALL * self.total


class Kept:
    """What has been kept of the differences from the average, tensor by tensor."""

    def __init__(self) -> None:
        self._tensors: dict[str, _Tensor] = {}
        self._told: set[str] = set()

    def tell(self, text: str) -> None:
        """Log what holds for the whole merge, at its first tensor only."""
        if text not in self._told:
            self._told.add(text)
            _LOG.info(text)

    def add(
        self, name: str, energy: Tensor, factors: LowRank | None, rounding: Tensor | None
    ) -> None:
        """Count one model's difference.

        Args:
            name: the tensor's.
            energy: squared norms of its matrices, ``(stack,)``, in fp64 (`total_energy`).
            factors: what is kept of it; None for all.
            rounding: what of its squared norms is rounding, ``(stack,)``, which does not count;
                None for nothing.
        """
        energy = energy.cpu()  # a few numbers; a GPU is waited for once
        totals = energy.tolist()
        tensor = self._tensors.setdefault(name, _Tensor())
        tensor.total += sum(totals)
        if factors is None:
            tensor.kept += sum(totals)
            return
        m, n = factors.U.shape[-2], factors.Vh.shape[-1]
        values = factors.S.cpu()
        held = values.double().square().sum(dim=-1)
        rounding = None if rounding is None else rounding.cpu()
        if rounding is not None:  # what is left out of it is no loss
            noise = rounding_that_tells(energy, rounding)
            held = torch.minimum(held + rounding_beyond(noise, factors.rank, m, n), energy)
        tensor.kept += float(held.sum())
        found = numerical_ranks(values, energy, rounding, m, n)
        tensor.ranks |= {rank for rank in found if rank}

    def data(self, names: Iterable[str]) -> dict[str, list[Any]]:
        """What is known of some tensors, as plain data for `add_data` in another process."""
        found = {name: self._tensors[name] for name in names if name in self._tensors}
        return {name: [it.kept, it.total, sorted(it.ranks)] for name, it in found.items()}

    def add_data(self, data: Mapping[str, Sequence[Any]]) -> None:
        """Take in whole tensors that another process has merged."""
        for name, (kept, total, ranks) in data.items():
            self._tensors[name] = _Tensor(kept, total, frozenset(ranks))

    def warning(self) -> str | None:
        """What to say at the end of the merge; None unless most tensors have kept nearly all."""
        tensors = list(self._tensors.values())
        largest = max((tensor.total for tensor in tensors), default=0.0)
        moved = [tensor for tensor in tensors if tensor.total > _ROUNDING * largest]
        whole = [tensor for tensor in moved if tensor.is_whole]
        if 2 * len(whole) <= len(moved):
            return None
        return (
            f"{len(whole):,} of {len(moved):,} decomposed tensors kept at least {NEARLY_ALL:.0%} "
            "of the models' differences from the average, which sum to zero: the result is nearly "
            f"the plain average. {_advice(whole)}"
        )


def _advice(whole: Iterable[_Tensor]) -> str:
    ranks = {rank for tensor in whole for rank in tensor.ranks}
    if ranks == {1}:
        return "No rank keeps less of differences of rank 1: use cart_auto"
    others = "the rank rule out, which then keeps a share of low ranks, or use cart_auto"
    if not ranks:
        return f"Leave {others}"
    half = min(ranks - {1}) // 2
    return f"Set rank: {half} (half of the smallest rank of these differences), leave {others}"


class Countdown:
    """A merge whose tensors come one by one, from several threads: what it kept when all have come.

    Attributes:
        kept: of the tensors so far.
    """

    def __init__(self) -> None:
        self.kept = Kept()
        self._due: set[str] = set()
        self._skipped: set[str] = set()
        self._over = False
        self._lock = threading.Lock()

    def skip(self, names: Iterable[str]) -> None:
        """Do not wait for some tensors: they may be planned and never come."""
        with self._lock:
            self._skipped.update(names)

    def plan(self, name: str) -> None:
        """Wait for a tensor; without effect if it is waited for, or the last one has come."""
        with self._lock:
            if name not in self._skipped and not self._over:
                self._due.add(name)

    def done(self, name: str) -> str | None:
        """Count a tensor as come; after the last one, `Kept.warning`."""
        with self._lock:
            if name not in self._due:
                return None
            self._due.remove(name)
            self._over = not self._due
            return self.kept.warning() if self._over else None
