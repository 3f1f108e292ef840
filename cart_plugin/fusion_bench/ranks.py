"""How many singular directions masks have chosen, by layer and task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cart_plugin.fusion_bench.merged import Merged


@dataclass(frozen=True)
class Chosen:
    """The ranks of a merged model with masks.

    Attributes:
        tasks: the tasks' names.
        candidates: how many directions each task may choose from, by layer; of a stack of matrices,
            such as experts, those of all together.
        ranks: how many it has chosen, by layer in the order of the tasks.
        matrices: how many matrices a layer has.
    """

    tasks: list[str]
    candidates: dict[str, list[int]]
    ranks: dict[str, list[int]]
    matrices: dict[str, int]

    @classmethod
    def of(cls, module: Merged, tasks: Sequence[str]) -> Chosen:
        """Those of a model as it is now."""
        masked = module.masked
        stacks = {name: len(term.values) for name, term in masked.items()}
        return cls(
            tasks=list(tasks),
            candidates={n: [stacks[n] * rank for rank in t.ranks] for n, t in masked.items()},
            ranks={name: term.chosen() for name, term in masked.items()},
            matrices=stacks,
        )

    def mean(self) -> float:
        """The mean rank of a matrix and task."""
        return sum(map(sum, self.ranks.values())) / self._count / len(self.tasks)

    @property
    def _count(self) -> int:
        return sum(self.matrices.values())

    def summary(self, start: Chosen) -> str:
        """A line a task: its mean rank, from what it started, and its extremes by layer."""
        width = max(map(len, self.tasks))
        lines = [f"Singular directions by task, mean of {self._count} matrices:"]
        for index, task in enumerate(self.tasks):
            before, after = (sum(r[index] for r in c.ranks.values()) for c in (start, self))
            means = {name: r[index] / self.matrices[name] for name, r in self.ranks.items()}
            least, most = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
            lines.append(
                f"  {task:{width}}  {before / self._count:.1f} -> {after / self._count:.1f}, "
                f"from {means[least]:.0f} ({least}) to {means[most]:.0f} ({most})"
            )
        return "\n".join(lines)

    def report(self, start: Chosen) -> dict[str, Any]:
        """The ranks by layer and task, before and after, for a JSON file."""

        def by_task(numbers: Sequence[int]) -> dict[str, int]:
            return dict(zip(self.tasks, numbers, strict=True))

        return {
            "mean_rank": {"start": start.mean(), "chosen": self.mean()},
            "layers": {
                name: {
                    "matrices": self.matrices[name],
                    "candidates": by_task(self.candidates[name]),
                    "start": by_task(start.ranks[name]),
                    "chosen": by_task(ranks),
                }
                for name, ranks in self.ranks.items()
            },
        }
