"""`python -m benchmarks.auto.low_rank`: variants of how adapters are combined around their base.

The LLM suite's adapters, of one start and of starts of their own, and image encoders', two to four
of them, on the validation split. What survived is in `cart_plugin.merging.low_rank_changes`, in
better numerics.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Literal

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor

from benchmarks.adapters.accuracy import ALONE, EXAMPLES, SETTINGS, Setting
from benchmarks.adapters.loaded import Loaded
from benchmarks.auto.study import mean
from benchmarks.common.commands import out_option, report_option, workers_option
from benchmarks.common.provenance import made_by
from benchmarks.common.record import Record, conditions
from benchmarks.common.tables import markdown_table
from benchmarks.common.training import in_processes
from cart_plugin import CartSettings
from cart_plugin.merging.informed import INFORMED_LEAST_KEPT, INFORMED_RIDGE, LEAST_SHARE
from cart_plugin.merging.spans import Difference, Merged, Span, merge_in_span, of_rank

SEEDS = (0, 1)
STUDIED = {
    "language-one": SETTINGS["language-one"],
    "language-own": SETTINGS["language-own"],
    "images": Setting("images", 16, (4,)),
}
PACKAGES = ("torch", "transformers", "peft")
REVISION = 1  # raised when a variant gives other weights


@dataclass(frozen=True)
class Variant:
    """How adapters are combined, in one respect after the other.

    Attributes:
        source: what a task's own inputs are taken from: all that it changed (`whole`), without what
            the tasks have in common (`own`), or its difference from the mean (`centred`).
        others: how much of the average's ``m^T m``, times the number of tasks, counts as inputs of
            each task.
        ridge: relative to the mean eigenvalue of the known directions.
    """

    source: Literal["whole", "own", "centred"] = "own"
    others: float = 1.0
    ridge: float = INFORMED_RIDGE


VARIANTS = {
    "the method": Variant(),
    "others: none": Variant(others=0.0),
    "others: half": Variant(others=0.5),
    "others: twice": Variant(others=2.0),
    "source: all that was changed": Variant(source="whole"),
    "source: that, others: none (as of whole models)": Variant(source="whole", others=0.0),
    "source: difference from the mean": Variant(source="centred"),
    "ridge 0.03": Variant(ridge=0.03),
    "ridge 1": Variant(ridge=1.0),
}
AVERAGE, WITHOUT_BASE = "average", "the form without the base"
WAYS = (ALONE, AVERAGE, WITHOUT_BASE, *VARIANTS)


def combine(taus: Tensor, inputs: int, variant: Variant) -> Tensor:
    """The matrix to add to the base, in the coordinates ``(T, p, q)`` of the changes."""
    count, average = len(taus), taus.mean(dim=0)
    square = average.mT @ average
    common = {"whole": 0 * average, "centred": average}.get(variant.source)
    if common is None:
        common = average @ _common(taus, square)
    gram, fitted = torch.zeros_like(square), torch.zeros_like(average)
    parts, known = [], 0
    for tau in taus:
        _, values, rows = torch.linalg.svd(tau - common, full_matrices=False)
        rows = rows[values > LEAST_SHARE * values[0]]
        values = values[: len(rows)]
        known += len(rows)
        covariance = (rows.mT * values**2) @ rows + variant.others * count * square
        covariance /= covariance.trace()
        gram += covariance
        fitted += (tau - average) @ covariance
        parts.append((tau - average) @ rows.mT @ rows)
    shift = variant.ridge * gram.trace() / min(known, inputs)
    total = torch.stack(parts).sum(dim=0)
    kept = total.square().sum() / torch.stack(parts).square().sum()
    right = fitted + shift * total / kept.clamp_min(INFORMED_LEAST_KEPT)
    gram.diagonal().add_(shift)
    return average + torch.linalg.solve(gram, right, left=False)


def _common(taus: Tensor, square: Tensor) -> Tensor:
    """Wiener's filter: the share of the average that the changes have in common."""
    count = len(taus)
    own = (taus.mT @ taus).sum(dim=0)
    across = (count**2 * square - own) / (count * (count - 1))
    values, vectors = torch.linalg.eigh(square)
    known = values > 1e-8 * values[-1]
    roots, vectors = values[known].sqrt(), vectors[:, known]
    shares, turned = torch.linalg.eigh((vectors / roots).mT @ across @ (vectors / roots))
    return (vectors / roots @ turned * shares.clamp(0, 1)) @ (vectors * roots @ turned).mT


def merge(way: str, loaded: Loaded, tasks: Sequence[str]) -> dict[str, Tensor]:
    """What a way adds to the weights."""
    found = {}
    shares = [1 / len(tasks)] * len(tasks)
    for name, adapters in loaded.factors(tasks).items():
        sides = [(one.left[None].double(), one.right[None].double()) for one in adapters]
        span = Span([Difference(*pair) for pair in sides])
        inputs = adapters[0].right.shape[1]
        if way in VARIANTS:
            taus = torch.cat([part.dense() for part in span.parts])
            total = combine(taus, inputs, VARIANTS[way])[None]
        elif way == AVERAGE:
            total = span.mean(shares)
        else:
            settings = CartSettings(lambda_="auto", center="average")
            total = merge_in_span(span, shares, settings).total
        factors = of_rank(Merged(total, None), min(total.shape[-2:]))
        left, right = span.lifted(factors)
        found[name] = (left @ right)[0].float()
    return found


def sets_of(tasks: Sequence[str]) -> dict[str, list[tuple[str, ...]]]:
    """Which adapters are merged, by how many they are: all pairs, all triples, all four."""
    return {str(count): list(combinations(tasks, count)) for count in (2, 3, 4)}


def study(name: str, seed: int, folder: Path) -> None:
    """Judge everything on one seed's adapters; what is known is not done again."""
    known = conditions(("linalg", "merging"), PACKAGES, timed=False, variants=REVISION)
    spared = {"revisions": lambda way: way != WITHOUT_BASE}
    record = Record(folder / f"{name}-{seed}.json", known, spared=spared)
    wanted = [way for way in WAYS if way not in record.cases]
    if not wanted:
        return
    loaded = STUDIED[name].load(seed, "validation")
    tasks = list(loaded.folders)
    for way in wanted:
        found: dict[str, list[dict[str, float]]] = {}
        alone: dict[str, float] = {}
        for task in tasks if way == ALONE else ():
            alone |= loaded.judge(loaded.deltas(task), [task])
        for count, chosen in sets_of(tasks).items():
            found[count] = [
                {task: alone[task] for task in members}
                if way == ALONE
                else loaded.judge(merge(way, loaded, members), members)
                for members in chosen
            ]
        record.put(way, found)
        text = ", ".join(f"{count}: {100 * mean(one):.1f}" for count, one in found.items())
        click.echo(f"{name} {seed}: {text} | {way}")


def markdown(folder: Path) -> str:
    """A row a way, a column a setting and number of adapters, means over seeds."""
    records = {
        name: [
            json.loads(path.read_text())
            for seed in SEEDS
            if (path := folder / f"{name}-{seed}.json").exists()
        ]
        for name in STUDIED
    }
    columns = [(name, str(count)) for name in STUDIED if records[name] for count in (2, 3, 4)]
    rows = []
    for way in WAYS:
        cells = []
        for name, count in columns:
            sets = [one["cases"][way][count] for one in records[name] if way in one["cases"]]
            cells.append(f"{100 * statistics.fmean(map(mean, sets)):.1f}" if sets else "-")
        rows.append([f"**{way}**" if way == "the method" else way, *cells])
    heading = [f"{name} ({len(records[name])}), {count}" for name, count in columns]
    measured = [one for found in records.values() for record in found for one in record["measured"]]
    return (
        f"Accuracy in per cent on the validation split ({EXAMPLES['validation']} examples a task) "
        "of merged LoRA adapters of rank 16, by suite and starts (the number of seeds in brackets) "
        "and number of adapters: means over all pairs, all triples and the four. "
        f"{made_by('bench-auto', measured)}\n\n"
        f"{markdown_table(['way', *heading], rows, ['---', *['---:'] * len(columns)])}\n"
    )


@click.command()
@workers_option
@out_option("auto")
@report_option
@click.option("--seeds", default=",".join(map(str, SEEDS)), show_default=True, help="Which.")
def main(workers: int, out: Path, only_report: bool, seeds: str) -> None:
    """Combine adapters in variants of the method, on validation splits."""
    folder = out / "low_rank"
    if not only_report:
        todo = [
            partial(study, name, int(seed), folder) for seed in seeds.split(",") for name in STUDIED
        ]
        in_processes(todo, workers)
    (out / "low_rank.md").write_text(markdown(folder))
    click.echo((out / "low_rank.md").read_text())


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.auto.low_rank")
