"""What compression has cost and lost: numbers for JSON, and a table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cart_plugin.checkpoints.files import write_json
from cart_plugin.checkpoints.servers import Loader
from cart_plugin.compress.servers import Layout

if TYPE_CHECKING:
    from rich.console import RenderableType

FILE = "report.json"
ALL_OF_IT = "all of it"
"""What is said of an error in zeros, which is infinite in relation to them."""
_WORST = 10


@dataclass
class Loss:
    """Squared norms of one tensor of one task: of itself, its difference, and what is lost."""

    weight: float = 0.0
    difference: float = 0.0
    lost: float = 0.0

    def add(self, other: Loss) -> None:
        """Add another tensor's."""
        self.weight += other.weight
        self.difference += other.difference
        self.lost += other.lost

    @property
    def error(self) -> float | None:
        """What is lost, relative to the weights (Frobenius); None if zeros have lost anything."""
        if self.weight:
            return math.sqrt(self.lost / self.weight)
        return None if self.lost else 0.0

    @property
    def of_difference(self) -> float:
        """What is lost, relative to the differences from the base."""
        return math.sqrt(self.lost / self.difference) if self.difference else 0.0

    def numbers(self) -> dict[str, float | None]:
        """For JSON."""
        return {"error": self.error, "error_of_difference": self.of_difference}


@dataclass
class Entry:
    """One tensor of the model in which tasks differ.

    Attributes:
        kind: "lora", "bias", "exact", or `Report.left`.
        reason: why it stays at the base.
        ranks: one a task, of LoRA.
        losses: one a task.
        bytes: of it in a whole model.
    """

    kind: str
    shape: tuple[int, ...]
    reason: str = ""
    bytes: int = 0
    ranks: list[int] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)


@dataclass
class Left:
    """Tensors that stay at the base for one reason.

    Attributes:
        reason: why.
        names: of them.
        bytes: of them in a whole model.
        error: the largest relative error of one of them in a task; None as of `Loss`.
        of_lost: their share of all that is lost, of squares over tensors and tasks.
    """

    reason: str
    names: list[str]
    bytes: int
    error: float | None
    of_lost: float


@dataclass
class Report:
    """What `compress` has done.

    Attributes:
        out: the folder.
        tasks: the tasks' names.
        center: what the base is: the models' average, or a base model that was given.
        layout: what the adapters may hold: "peft" or "servers".
        loaders: what loads them, and what does not.
        models_bytes: of the weight files of all models.
        base_bytes: of the base's weight files.
        adapter_bytes: one a task: weights, config, and the record of the base.
        task_files: one a task: those of tokenizer and the like that differ from the base's.
        absent_files: one a task: those that the base has and the task's model has not.
        entries: by the tensor's name.
        notes: what a user has to know.
        seconds: by step.
    """

    out: Path
    tasks: list[str]
    center: Literal["average", "base"] = "average"
    layout: Layout = "peft"
    loaders: list[Loader] = field(default_factory=list)
    models_bytes: int = 0
    base_bytes: int = 0
    adapter_bytes: list[int] = field(default_factory=list)
    task_files: list[list[str]] = field(default_factory=list)
    absent_files: list[list[str]] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> str:
        """The kind of tensors that stay at the base: "averaged", or "base" where one was given."""
        return "averaged" if self.center == "average" else "base"

    @property
    def bytes(self) -> int:
        """Of the base and all adapters."""
        return self.base_bytes + sum(self.adapter_bytes)

    @property
    def share(self) -> float:
        """Of the models' bytes."""
        return self.bytes / self.models_bytes

    def total(self, task: int) -> Loss:
        """A task's loss over all tensors in which tasks differ."""
        total = Loss()
        for entry in self.entries.values():
            total.add(entry.losses[task])
        return total

    @property
    def squared_error(self) -> float:
        """Of all tensors and tasks together."""
        return sum(self.total(task).lost for task in range(len(self.tasks)))

    def left_out(self) -> list[Left]:
        """What stays at the base, by the reason for it."""
        reasons: dict[str, list[str]] = {}
        for name, entry in self.entries.items():
            if entry.kind == self.left:
                reasons.setdefault(entry.reason, []).append(name)
        total = self.squared_error
        found = []
        for reason, names in reasons.items():
            entries = [self.entries[name] for name in names]
            losses = [loss for entry in entries for loss in entry.losses]
            lost = sum(loss.lost for loss in losses)
            errors = [loss.error for loss in losses if loss.error is not None]
            found.append(
                Left(
                    reason,
                    names,
                    sum(entry.bytes for entry in entries),
                    max(errors) if len(errors) == len(losses) else None,
                    lost / total if total else 0.0,
                )
            )
        return found

    def worst(self) -> list[tuple[str, str, Loss]]:
        """The tensors that lose most of their difference: name, task, loss."""
        found = [
            (name, task, loss)
            for name, entry in self.entries.items()
            for task, loss in zip(self.tasks, entry.losses, strict=True)
            if loss.lost > 0
        ]
        return sorted(found, key=lambda row: -row[2].of_difference)[:_WORST]

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "center": self.center,
            "layout": self.layout,
            "loaded_by": {loader.name: loader.document() for loader in self.loaders},
            "bytes": self.bytes,
            "share": self.share,
            "models_bytes": self.models_bytes,
            "base_bytes": self.base_bytes,
            "squared_error": self.squared_error,
            "notes": self.notes,
            "seconds": self.seconds,
            "tasks": {
                task: {
                    "bytes": self.adapter_bytes[index],
                    "share": self.adapter_bytes[index] / self.models_bytes,
                    "task_files": self.task_files[index],
                    "absent_files": self.absent_files[index],
                    **self.total(index).numbers(),
                }
                for index, task in enumerate(self.tasks)
            },
            "left": [asdict(left) for left in self.left_out()],
            "worst": [
                {"tensor": name, "task": task, **loss.numbers()}
                for name, task, loss in self.worst()
            ],
            "tensors": {name: self._tensor(entry) for name, entry in self.entries.items()},
        }

    def _tensor(self, entry: Entry) -> dict[str, Any]:
        found: dict[str, Any] = {
            "kind": entry.kind,
            "shape": list(entry.shape),
            "bytes": entry.bytes,
        }
        if entry.reason:
            found["reason"] = entry.reason
        found["tasks"] = {
            task: {**({"rank": entry.ranks[index]} if entry.ranks else {}), **loss.numbers()}
            for index, (task, loss) in enumerate(zip(self.tasks, entry.losses, strict=True))
        }
        return found

    def write(self, folder: Path) -> None:
        """Write the JSON file."""
        write_json(folder / FILE, self.document())

    def tables(self) -> list[RenderableType]:
        """Tables of the tasks and of the worst tensors."""
        from rich.markup import escape
        from rich.table import Table

        tasks = Table(box=None, pad_edge=False, header_style="bold")
        tasks.add_column("")
        for column in ("bytes", "share of models", "error", "of difference"):
            tasks.add_column(column, justify="right")
        base = "base (the average)" if self.center == "average" else "base (as given)"
        tasks.add_row(base, *_bytes(self.base_bytes, self.models_bytes), "", "")
        for index, task in enumerate(self.tasks):
            loss = self.total(index)
            tasks.add_row(
                escape(task),
                *_bytes(self.adapter_bytes[index], self.models_bytes),
                ALL_OF_IT if loss.error is None else f"{loss.error:.2e}",
                f"{loss.of_difference:.1%}",
            )
        total = _bytes(self.bytes, self.models_bytes)
        tasks.add_row("together", *total, "", "", style="bold")
        worst = Table(box=None, pad_edge=False, header_style="bold")
        worst.add_column("worst tensors", overflow="fold")
        worst.add_column("task")
        worst.add_column("kept as")
        worst.add_column("of difference", justify="right")
        for name, task, loss in self.worst():
            kind = self.entries[name].kind
            worst.add_row(escape(name), escape(task), kind, f"{loss.of_difference:.1%}")
        return [tasks, worst] if worst.row_count else [tasks]


def _bytes(count: int, of: int) -> tuple[str, str]:
    return f"{count:,}", f"{count / of:.1%}"
