"""What a merge of adapters has kept, and what the adapters have in common: for JSON, and tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cart_plugin.adapters import servers
from cart_plugin.adapters.work import Done, Merge
from cart_plugin.checkpoints.files import write_json
from cart_plugin.checkpoints.servers import Loader
from cart_plugin.merging.span_measures import Answers
from cart_plugin.wording import some

if TYPE_CHECKING:
    from rich.console import RenderableType

FILE = "report.json"
_WORST = 10
_WELL_KEPT = 0.99
_ALIKE = 0.95  # cosine of two adapters' differences
_LARGE = 5.0  # one adapter's difference against the next largest one's
_SMALL = 1e-3  # one adapter's difference against the largest one
_ONE_START = 0.5  # share of the row spaces that two adapters have in common, beyond chance
_CANCELLED = 0.5  # share of squares in the average, of those of unrelated differences
_MOST_SHOWN = 10.0  # larger shares are of adapters that changed next to nothing


@dataclass
class Kept:
    """How a merge answers in an adapter's place, on what the adapter shows of its inputs.

    Attributes:
        kept: share of the adapter's own answer that is in the merge's, 1 for all of it.
        error: norm of what the merge answers otherwise, relative to the adapter's own answer.
    """

    kept: float
    error: float

    def numbers(self) -> dict[str, float]:
        """For JSON."""
        return {"kept": self.kept, "error": self.error}


def _kept(found: Answers) -> list[Kept]:
    """One an adapter; of one that does not change the weight, nothing is lost."""
    return [
        Kept(along / own, math.sqrt(beside / own)) if own else Kept(1.0, 0.0)
        for own, along, beside in zip(*(values.tolist() for values in found), strict=True)
    ]


@dataclass
class Report:
    """What `merge_adapters` has done.

    Attributes:
        merge: the plan, the request, the adapters' shares and the rank.
        paths: of the adapters, by their names, in the order they were given.
        bytes: of the merged adapter's weights.
        seconds: of all of it.
        notes: what a user has to know.
        exact: of all weights together, for a merge without a bound on its rank.
        cut: the same for the one that is written.
        modules: each adapter's, of the latter, by PEFT's names of modules.
        cosines: of the adapters' differences, ``(T, T)``, in the plan's order.
        outputs: mean overlap of their column spaces (of B) over the weights that both change.
        inputs: the same of their row spaces (of A).
    """

    merge: Merge
    paths: dict[str, str]
    bytes: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    exact: list[Kept] = field(default_factory=list)
    cut: list[Kept] = field(default_factory=list)
    modules: dict[str, list[Kept]] = field(default_factory=dict)
    cosines: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))
    outputs: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))
    inputs: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))

    @property
    def names(self) -> list[str]:
        """The adapters' names, in the plan's order."""
        return [adapter.name for adapter in self.merge.plan.adapters]

    @property
    def rank(self) -> int:
        """Of the merged adapter."""
        return self.merge.rank

    @property
    def loaders(self) -> list[Loader]:
        """What loads the merged adapter, and what does not."""
        return servers.loaders(self.merge)

    def worst(self) -> list[tuple[str, str, Kept]]:
        """The modules that keep least of an adapter that counts: module, adapter, what is kept."""
        found = [
            (module, name, kept)
            for module, row in self.modules.items()
            for name, share, kept in zip(self.names, self.merge.shares, row, strict=True)
            if share > 0
        ]
        return sorted(found, key=lambda entry: entry[2].kept)[:_WORST]

    def document(self) -> dict[str, Any]:
        """For JSON."""
        request, plan = self.merge.request, self.merge.plan
        indices = {name: index for index, name in enumerate(self.names)}
        return {
            "method": request.method,
            "rank": self.rank,
            "exact_rank": self.merge.full_rank,
            "loaded_by": {loader.name: loader.document() for loader in self.loaders},
            "bytes": self.bytes,
            "seconds": self.seconds,
            "notes": self.notes,
            "adapters": {
                name: {
                    "path": path,
                    "weight": self.merge.shares[indices[name]],
                    "rank": _rank(self.merge, indices[name]),
                    "bytes": plan.adapters[indices[name]].checkpoint.bytes,
                    **self.cut[indices[name]].numbers(),
                    "without_the_bound_on_the_rank": self.exact[indices[name]].numbers(),
                }
                for name, path in self.paths.items()
            },
            "pairs": list(self._pairs()),
            "modules": {
                module: {
                    name: {
                        "rank": layer.rank if layer else 0,
                        **kept.numbers(),
                    }
                    for name, layer, kept in zip(
                        self.names,
                        (adapter.layers.get(module) for adapter in plan.adapters),
                        row,
                        strict=True,
                    )
                }
                for module, row in self.modules.items()
            },
        }

    def _pairs(self) -> Iterator[dict[str, Any]]:
        for i, name in enumerate(self.names):
            for j in range(i):
                yield {
                    "adapters": [self.names[j], name],
                    "cosine": float(self.cosines[i, j]),
                    "overlap_of_a": float(self.inputs[i, j]),
                    "overlap_of_b": float(self.outputs[i, j]),
                }

    def write(self, folder: Path) -> None:
        """Write the JSON file."""
        write_json(folder / FILE, self.document())

    def tables(self) -> list[RenderableType]:
        """A table of the adapters, and one of the modules that keep least."""
        from rich.markup import escape
        from rich.table import Table

        found = Table(box=None, pad_edge=False, header_style="bold")
        found.add_column("adapter")
        columns = ["weight", "rank", "kept", "error"]
        is_cut = self.rank < self.merge.full_rank
        if is_cut:
            columns.append(f"kept at rank {self.merge.full_rank}")
        for column in columns:
            found.add_column(column, justify="right")
        for name in self.paths:
            index = self.names.index(name)
            shares = [self.cut[index].kept, self.cut[index].error]
            shares += [self.exact[index].kept] if is_cut else []
            counts = self.merge.shares[index] != 0
            found.add_row(
                escape(name),
                f"{self.merge.shares[index]:.3g}",
                str(_rank(self.merge, index)),
                *(_percent(share) if counts else "-" for share in shares),
            )
        worst = Table(box=None, pad_edge=False, header_style="bold")
        worst.add_column("modules that keep least", overflow="fold")
        worst.add_column("of adapter")
        worst.add_column("kept", justify="right")
        for module, name, kept in self.worst()[:3]:
            if kept.kept < _WELL_KEPT:
                worst.add_row(escape(module), escape(name), _percent(kept.kept))
        return [found, worst] if worst.row_count else [found]


def _percent(share: float) -> str:
    return f"{share:.1%}" if abs(share) < _MOST_SHOWN else f"> {_MOST_SHOWN:.0%}"


def _rank(merge: Merge, index: int) -> int:
    return max(layer.rank for layer in merge.plan.adapters[index].layers.values())


class Sums:
    """Adds the merged weights' measures up."""

    def __init__(self, merge: Merge) -> None:
        """Start with nothing."""
        count = len(merge.plan.adapters)
        self.merge = merge
        self.modules: dict[str, list[Kept]] = {}
        self._exact, self._cut = torch.zeros(2, 3, count, dtype=torch.float64, device="cpu")
        self._inner, self._outputs, self._inputs, self._both = torch.zeros(
            4, count, count, dtype=torch.float64, device="cpu"
        )
        self._averaged: list[str] = []

    def add(self, done: Done) -> None:
        """Count one weight."""
        self.modules[done.module] = _kept(done.cut)
        self._exact += torch.stack(list(done.exact))
        self._cut += torch.stack(list(done.cut))
        self._inner += done.overlaps.inner
        self._outputs += done.overlaps.outputs
        self._inputs += done.overlaps.inputs
        changed = (done.cut.own > 0).double()
        self._both += changed[:, None] * changed
        if done.is_averaged:
            self._averaged.append(done.module)

    def fill(self, report: Report) -> None:
        """Enter the sums into a report, and what follows from them into its notes."""
        norms = self._inner.diagonal().sqrt()
        both = self._both.clamp_min(1)
        report.exact, report.cut = _kept(Answers(*self._exact)), _kept(Answers(*self._cut))
        report.modules = self.modules
        report.cosines = self._inner / (norms[:, None] * norms)
        report.outputs, report.inputs = self._outputs / both, self._inputs / both
        report.notes += self.merge.plan.notes
        report.notes += _notes(report, norms.tolist(), self._averaged)
        report.notes += [
            f"give this adapter not to {loader.name}: {'; '.join(loader.reasons)}"
            for loader in report.loaders
            if loader.silent
        ]


def _notes(report: Report, norms: Sequence[float], averaged: Sequence[str]) -> Iterator[str]:
    names, merge = report.names, report.merge
    counting = [index for index, share in enumerate(merge.shares) if share]
    if merge.rank > merge.full_rank:
        yield (
            f"rank {merge.rank} is more than the {merge.full_rank} that lose nothing: the rest is "
            "zeros, which make the adapter larger and no better"
        )
    if averaged:
        yield f"tables of tokens and the like ({some(averaged)}) are averaged, as in whole models"
    if merge.request.method == "cart" and len(counting) == 2:
        yield (
            "with two adapters the method cart is plain averaging: their differences from the "
            "average are opposite; use auto, or three adapters or more"
        )
    elif merge.kept.warning() is not None:
        yield (
            "the method cart kept nearly all of the adapters' differences from their average, "
            "which sum to zero: the result is nearly the plain average; keep less (--keep, half "
            "of their rank or less), or use auto"
        )
    sides = torch.tensor([merge.shares, norms], dtype=torch.float64, device="cpu")
    sizes = sides.prod(dim=0)
    left = float(sizes @ report.cosines @ sizes / sizes.square().sum())
    if min(merge.shares) >= 0 and len(counting) > 1 and left < _CANCELLED:
        yield (
            f"the adapters' differences cancel: their average has {max(left, 0):.0%} of the "
            "squares that it would have if they had nothing to do with each other, as of adapters "
            "that `mergekit-cart compress` made around the average of models; merge those models "
            "whole (`mergekit-cart merge`)"
        )
    for i in counting:
        for j in counting[: counting.index(i)]:
            cosine, start = float(report.cosines[i, j]), float(report.inputs[i, j])
            if cosine > _ALIKE:
                yield (
                    f"{names[j]} and {names[i]} are nearly the same (cosine {cosine:.2f}): what "
                    "they have in common counts twice"
                )
            elif start > _ONE_START + (1 - _ONE_START) * _by_chance(merge, i, j):
                yield (
                    f"{names[j]} and {names[i]} were trained from one start: {start:.0%} of the "
                    "space of their A is common, so that A tells less of what each was trained on"
                )
    ranked = sorted(((abs(merge.shares[i]) * norms[i], names[i]) for i in counting), reverse=True)
    largest, dominating = ranked[0]
    for size, name in ranked:
        if size < _SMALL * largest:
            yield (
                f"{name} changes next to nothing: its difference is {largest / size:.0e} times "
                f"smaller than that of {dominating}; was it trained?"
            )
    others = [size for size, _ in ranked[1:] if size >= _SMALL * largest]
    if others and largest > _LARGE * others[0]:
        yield (
            f"{dominating} dominates: its difference is {largest / others[0]:.1f} times as large "
            "as the next largest one; --weights can balance that"
        )


def _by_chance(merge: Merge, i: int, j: int) -> float:
    """The share of the row spaces that two adapters of A drawn apart have in common, on average."""
    plan = merge.plan
    one, other = plan.adapters[i].layers, plan.adapters[j].layers
    shares = [
        min(1.0, max(one[module].rank, other[module].rank) / plan.shapes[module].n)
        for module in one.keys() & other.keys()
    ]
    return sum(shares) / max(len(shares), 1)
