"""`python -m benchmarks.convolutions`: four EfficientNets merged, kernels decomposed or averaged.

All weights but batch norms are convolution kernels: 1 x 1 ones, which are matrices, and k x k ones
of single channels, which CART takes as `(out, in * k * k)`. Each way is measured with both, and
with the 1 x 1 kernels alone; with none of them it is the average. Settings are chosen on validation
images of the first seed, among at most twelve, and judged once on test images. Statistics of batch
norms are averaged by all methods.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.common.commands import (
    out_option,
    progress,
    publish,
    report_option,
    resume_option,
    workers_option,
)
from benchmarks.common.data_free import OF_TAUS, merged_state
from benchmarks.common.heads import Head
from benchmarks.common.provenance import made_by
from benchmarks.common.record import Record, conditions
from benchmarks.common.tables import markdown_table, percent_cell
from benchmarks.convolutions.backbone import load_backbone, load_weights, weights_of
from benchmarks.convolutions.finetune import WEIGHTS, FineTuning, accuracy, finetune_all
from benchmarks.vision.tasks import load_split, task
from cart_plugin import CartSettings, merge_state_dicts
from cart_plugin.merging.tensors import is_decomposed

State = dict[str, Tensor]
Point = dict[str, float]
Decision = Callable[[str, torch.Size], bool]
TASKS = ("mnist", "fashion", "hiragana", "themes")
VALIDATION, TEST = 100, 500  # images a task
PACKAGES = ("torch", "scipy", "mergekit", "fusion-bench")
REVISION = 1  # raised when this code gives other figures
MOST_POINTS = 12


def one_by_one(name: str, shape: torch.Size) -> bool:
    """Kernels that are matrices."""
    return is_decomposed(name, shape) and all(side == 1 for side in shape[2:])


KERNELS: dict[str, Decision] = {"all": is_decomposed, "1 x 1": one_by_one}
_SCALES = (0.5, 0.7, 0.85, 1.0, 1.3, 1.6, 2.0, 3.0)
_CART = {"rank_ratio": (0.08, 0.16, 0.32), "lambda": (1.0, 2.0, 3.0, 4.0)}


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        title: of the method.
        kernels: which kernels it takes as matrices, a key of `KERNELS`, or `none`.
        grid: settings to choose from.
        kind: how it merges: `average`, `cart`, `auto`, `auto, base`, or a key of `OF_TAUS`.
    """

    title: str
    kernels: str
    kind: str
    grid: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def points(self) -> list[Point]:
        """All settings of the grid."""
        return [
            dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())
        ]


METHODS = {
    "average": Method("average", "none", "average"),
    "task_arithmetic": Method(
        "task arithmetic", "none", "sum", {"scale": (0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)}
    ),
    "ties": Method("TIES, density 0.2", "none", "TIES", {"scale": _SCALES}),
    **{
        f"{name.lower()} {kernels}": Method(name, kernels, name, {"scale": _SCALES})
        for name in ("TSV-M", "Iso-C")
        for kernels in KERNELS
    },
    **{
        f"{kind} {kernels}": Method(title, kernels, kind, grid)
        for kind, title, grid in (
            ("cart", "CART", _CART),
            ("auto", "CART, no hyperparameters", {}),
            ("auto, base", "the same, with the base", {}),
        )
        for kernels in KERNELS
    },
}


def merge(method: Method, point: Point, tuned: Mapping[str, State], base: State) -> State:
    """Merge encoders, in fp32.

    Args:
        method: how.
        point: its settings.
        tuned: the encoders' weights by task.
        base: the pretrained encoder's.
    """
    states = list(tuned.values())
    decompose = KERNELS.get(method.kernels, lambda *_: False)
    if method.kind in ("average", "cart", "auto", "auto, base"):
        settings = CartSettings()
        if method.kind == "cart":
            settings = CartSettings(rank_ratio=point["rank_ratio"], lambda_=point["lambda"])
        elif method.kind != "average":
            settings = CartSettings(lambda_="auto")
        start = base if method.kind == "auto, base" else None
        return merge_state_dicts(dict(tuned), settings, base=start, decompose=decompose)
    average = merge_state_dicts(dict(tuned), decompose=lambda *_: False)
    scale = point["scale"]
    if method.kind == "sum":
        return {
            name: start + scale * len(states) * (average[name] - start)
            for name, start in base.items()
        }
    # Element by element TIES has no use of matrices, and takes all kernels.
    chosen = is_decomposed if method.kind == "TIES" else decompose
    merged = merged_state(OF_TAUS[method.kind], states, base)
    return {
        name: start + scale * (merged[name] - start) if chosen(name, start.shape) else average[name]
        for name, start in base.items()
    }


class Judge:
    """Accuracy of weights on the tasks.

    Args:
        folders: of the fine-tuned encoders, with their heads, by task.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.heads = {name: Head.load(folder / "head") for name, folder in folders.items()}
        self.model = load_backbone()

    def __call__(self, weights: State, split: str, only: str | None = None) -> dict[str, float]:
        """Accuracies (0 to 1) by task, or of one task alone."""
        load_weights(self.model, weights)
        most = VALIDATION if split == "validation" else TEST
        return {
            name: accuracy(self.model, head, load_split(name, split).head(most))
            for name, head in self.heads.items()
            if only in (None, name)
        }


@dataclass(frozen=True)
class Seed:
    """What a fine-tuning seed has: its encoders, and what judges them."""

    tuned: Mapping[str, State]
    base: State
    judge: Callable[..., dict[str, float]]


def load_seed(seed: int, workers: int) -> Seed:
    """Fine-tune what is missing, and load it."""
    folders = finetune_all(TASKS, seed, workers=workers)
    tuned = {name: load_file(folder / WEIGHTS) for name, folder in folders.items()}
    return Seed(tuned, weights_of(load_backbone()), Judge(folders))


def key_of(seed: int, split: str, method: str, point: Point) -> str:
    """A case's key in the record."""
    return f"{seed} | {split} | {method} | {json.dumps(point)}"


def jobs(seed: int, split: str, record: Record) -> Iterator[tuple[str, Method, Point]]:
    """What a split needs: all settings on validation, the best of each method on test."""
    for name, method in METHODS.items():
        points = method.points()
        for point in points if split == "validation" else [best(name, record)]:
            if (key := key_of(seed, split, name, point)) not in record.cases:
                yield key, method, point


def best(name: str, record: Record) -> Point:
    """A method's settings with the best mean on the first seed's validation images."""
    first = min(int(key.split(" | ")[0]) for key in record.cases)

    def mean(point: Point) -> float:
        return statistics.fmean(record.cases[key_of(first, "validation", name, point)].values())

    points = METHODS[name].points()
    return max(points, key=mean) if len(points) > 1 else points[0]


def run(seeds: Sequence[int], load: Callable[[int], Seed], record: Record, bar: Any) -> None:
    """Do what is missing, seed by seed.

    Args:
        seeds: settings are chosen on the first.
        load: gives a seed's encoders.
        record: of the cases.
        bar: of rich, for progress.
    """
    for seed in seeds:
        splits = ("validation", "test") if seed == seeds[0] else ("test",)
        held = None
        for split in splits:
            todo = list(jobs(seed, split, record))
            ends = [
                (key, kind)
                for kind in ("pretrained", "individual")
                if split == "test" and (key := key_of(seed, split, kind, {})) not in record.cases
            ]
            if not todo and not ends:
                continue
            held = held or load(seed)
            row = bar.add_task(f"seed {seed}, {split}", total=len(todo) + len(ends))
            for key, kind in ends:
                record.put(key, _end(kind, held, split))
                bar.advance(row)
            for key, method, point in todo:
                record.put(key, held.judge(merge(method, point, held.tuned, held.base), split))
                bar.advance(row)


def _end(kind: str, held: Seed, split: str) -> dict[str, float]:
    if kind == "pretrained":
        return held.judge(held.base, split)
    found: dict[str, float] = {}
    for name, weights in held.tuned.items():
        found |= held.judge(weights, split, name)
    return found


def markdown(record: Record, seeds: Sequence[int]) -> str:
    """The table, by mean accuracy."""
    rows = []
    for name in ("pretrained", *METHODS, "individual"):
        method = METHODS.get(name)
        point = best(name, record) if method else {}
        cases = [record.cases[key_of(seed, "test", name, point)] for seed in seeds]
        means = [statistics.fmean(case.values()) for case in cases]
        chosen = ", ".join(f"{key} {value:g}" for key, value in point.items())
        cells = [f"{100 * statistics.fmean(case[one] for case in cases):.1f}" for one in TASKS]
        title, kernels = (method.title, method.kernels) if method else (name, "")
        rows.append(
            (statistics.fmean(means), [title, kernels, *cells, percent_cell(means), chosen])
        )
    rows.sort(key=lambda row: row[0])
    heading = ["method", "kernels as matrices", *(task(one).title for one in TASKS), "mean"]
    table = markdown_table(
        [*heading, "chosen"], [row for _, row in rows], ["---", "---", *["---:"] * 5, "---"]
    )
    count = "one seed" if len(seeds) == 1 else f"{len(seeds)} fine-tuning seeds ± standard error"
    return (
        f"Test accuracy in per cent ({TEST} images a task) of EfficientNet-lite0, {count}. "
        f"Settings were chosen on {VALIDATION} validation images a task of the first seed, among "
        f"at most {MOST_POINTS}. {made_by('bench-convolutions', record.measured)}\n\n{table}\n"
    )


@click.command()
@click.option("--seeds", default="0", show_default=True, help="Of the fine-tuning.")
@workers_option
@resume_option
@report_option
@out_option("convolutions")
def main(seeds: str, workers: int, resume: bool, only_report: bool, out: Path) -> None:
    """Merge EfficientNets of four image tasks, kernels decomposed or averaged."""
    console = Console()
    chosen = [int(seed) for seed in seeds.split(",")]
    if only_report:
        record = Record.written(out / "results.json")
    else:
        current = conditions(
            ("linalg", "merging"),
            PACKAGES,
            timed=False,
            own=REVISION,
            fine_tuning=FineTuning().__dict__,
            tasks=TASKS,
        )
        record = Record(out / "results.json", current, resume)
        if record.discarded:
            console.print(f"Starting anew: {record.path} was {record.discarded}")
        with progress(console) as bar:
            run(chosen, lambda seed: load_seed(seed, workers), record, bar)
    publish(markdown(record, chosen), out / "table.md", console)
