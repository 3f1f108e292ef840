"""How many singular directions masks have chosen, by layer and task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cart_plugin.fusion_bench.merged import LowRankTerm, Merged


@dataclass(frozen=True)
class Ranks:
    """Directions of one layer, by task; of a stack, such as experts, of all matrices together.

    Attributes:
        matrices: how many matrices the layer has.
        candidates: what each task may choose from.
        start: what the merge kept before it was adapted.
        chosen: what it keeps now.
        added: what of that it did not keep before.
    """

    matrices: int
    candidates: list[int]
    start: list[int]
    chosen: list[int]
    added: list[int]

    @classmethod
    def of(cls, term: LowRankTerm) -> Ranks:
        """Those of a term as it is now."""
        stack = len(term.values)
        return cls(
            matrices=stack,
            candidates=[stack * rank for rank in term.ranks],
            start=term.counts(term.kept),
            chosen=term.counts(term.mask),
            added=term.counts(term.mask & ~term.kept),
        )

    @property
    def removed(self) -> list[int]:
        """What it kept before and does not keep now."""
        counts = zip(self.start, self.chosen, self.added, strict=True)
        return [start + added - chosen for start, chosen, added in counts]


def ranks_of(module: Merged) -> dict[str, Ranks]:
    """The ranks of a merged model with masks, by layer."""
    return {name: Ranks.of(term) for name, term in module.masked.items()}


def mean_rank(module: Merged) -> float:
    """The mean rank of a matrix and task."""
    terms = module.masked.values()
    matrices = sum(len(term.values) * len(term.ranks) for term in terms)
    return sum(int(term.mask.sum()) for term in terms) / matrices


def summary(layers: dict[str, Ranks], tasks: Sequence[str]) -> str:
    """A line a task: its mean rank before and after, and its extremes by layer."""
    count = sum(layer.matrices for layer in layers.values())
    width = max(map(len, tasks))
    lines = [f"Singular directions by task, mean of {count} matrices:"]
    for index, task in enumerate(tasks):

        def mean(what: str, index: int = index) -> float:
            return sum(getattr(layer, what)[index] for layer in layers.values()) / count

        means = {name: layer.chosen[index] / layer.matrices for name, layer in layers.items()}
        least, most = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        lines.append(
            f"  {task:{width}}  {mean('start'):.1f} -> {mean('chosen'):.1f} "
            f"({mean('added'):.1f} added, {mean('removed'):.1f} removed), "
            f"from {means[least]:.0f} ({least}) to {means[most]:.0f} ({most})"
        )
    return "\n".join(lines)


def report(layers: dict[str, Ranks], tasks: Sequence[str]) -> dict[str, Any]:
    """The same by layer, for a JSON file."""
    kinds = ("candidates", "start", "chosen", "added", "removed")
    return {
        name: {"matrices": layer.matrices}
        | {kind: dict(zip(tasks, getattr(layer, kind), strict=True)) for kind in kinds}
        for name, layer in layers.items()
    }
