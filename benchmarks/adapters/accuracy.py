"""`python -m benchmarks.adapters.accuracy`: what is left of adapters that were merged into one.

The LLM suite's adapters, of one start and of starts of their own, and LoRA-tuned image encoders of
three ranks, merged by `merge_adapters`, by all of PEFT's ways and by published ones. The others
choose their scale on the validation split of the first seed; the test split is used once.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.adapters import formulas
from benchmarks.adapters.loaded import Loaded
from benchmarks.adapters.ways import WAYS
from benchmarks.common.commands import out_option, report_option, workers_option
from benchmarks.common.provenance import made_by
from benchmarks.common.record import MERGES_ADAPTERS, Record, conditions
from benchmarks.common.tables import markdown_table, percent_cell
from benchmarks.common.training import in_processes

SEEDS = (0, 1, 2)
EXAMPLES = {"validation": 50, "test": 100}  # a task
PACKAGES = ("torch", "transformers", "peft")
ALONE, BASE, ALL = "each adapter alone", "base", "auto, all ranks"

SplitName = Literal["validation", "test"]


@dataclass(frozen=True)
class Setting:
    """Some adapters to merge.

    Attributes:
        suite: whose.
        rank: of the adapters.
        counts: how many are merged: the suite's first ones.
        one_start: all of a seed start from the same A.
    """

    suite: Literal["language", "images"]
    rank: int
    counts: tuple[int, ...]
    one_start: bool = False

    def load(self, seed: int, split: SplitName) -> Loaded:
        """The adapters of a seed, trained now if that has not been done."""
        if self.suite == "language":
            from benchmarks.adapters import language

            return language.load(seed, split, EXAMPLES[split], one_start=self.one_start)
        from benchmarks.adapters import images
        from benchmarks.suites import task_order

        tasks = task_order("vision")[: max(self.counts)]
        return images.load(seed, split, EXAMPLES[split], rank=self.rank, tasks=tasks)


SETTINGS = {
    "language-one": Setting("language", 16, (4,), one_start=True),
    "language-own": Setting("language", 16, (4,)),
    "images-16": Setting("images", 16, (4, 8)),
    "images-4": Setting("images", 4, (4, 8)),
    "images-64": Setting("images", 64, (4, 8)),
}


def mean(accuracies: Mapping[str, float]) -> float:
    """Over tasks."""
    return statistics.fmean(accuracies.values())


def open_record(path: Path) -> Record:
    """What is known of a setting, by number of adapters and way."""
    known = conditions(
        MERGES_ADAPTERS,
        PACKAGES,
        timed=False,
        examples=EXAMPLES,
        formulas=formulas.REVISION,
    )

    def others(key: str) -> bool:
        way = WAYS.get(key.partition(": ")[2])
        return way is None or not way.ours

    return Record(path, known, spared={"revisions": others})


def ways_for(count: int) -> list[str]:
    """The ways to merge so many adapters, without those to ranks beyond what there is."""
    return [way for way, one in WAYS.items() if one.ranks in (None, 1) or one.ranks < count]


def key_of(count: int, way: str) -> str:
    """Of a case."""
    return f"{count}: {way}"


def _names(scales: Iterable[float]) -> set[str]:
    return {f"{scale:g}" for scale in scales}


def tune(name: str, folder: Path) -> None:
    """Judge all scales of all ways on the first seed's validation split.

    A case is the mean accuracy by scale; what is known is not done again.
    """
    setting = SETTINGS[name]
    record = open_record(folder / f"{name}-validation.json")
    wanted = [
        (count, way)
        for count in setting.counts
        for way in ways_for(count)
        if not _names(WAYS[way].choices(count)) <= set(record.cases.get(key_of(count, way), {}))
    ]
    if not wanted:
        return
    loaded = setting.load(SEEDS[0], "validation")
    for count, way in wanted:
        tasks = list(loaded.folders)[:count]
        deltas = WAYS[way].merge(loaded, tasks, setting.rank)
        known = record.cases.get(key_of(count, way), {})
        found = known | {
            f"{scale:g}": mean(loaded.judge(deltas, tasks, scale))
            for scale in WAYS[way].choices(count)
            if f"{scale:g}" not in known
        }
        record.put(key_of(count, way), found, adds=True)
        text = ", ".join(f"{scale}: {100 * one:.1f}" for scale, one in found.items())
        click.echo(f"{name} validation, {key_of(count, way)}: {text}")


def test(name: str, seed: int, folder: Path) -> None:
    """Judge all ways at their chosen scales on a seed's test split; `tune` goes before.

    A case has the accuracies by task, the scale and the seconds that merging took.
    """
    setting = SETTINGS[name]
    chosen = open_record(folder / f"{name}-validation.json").cases
    record = open_record(folder / f"{name}-{seed}.json")
    scales: dict[str, float] = {
        key: float(max(scores, key=lambda one: scores[one])) for key, scores in chosen.items()
    }
    wanted = [
        (count, way)
        for count in setting.counts
        for way in (BASE, ALONE, *ways_for(count))
        if (known := record.cases.get(key_of(count, way))) is None
        or known.get("scale") != scales.get(key_of(count, way))
    ]
    if not wanted:
        return
    loaded = setting.load(seed, "test")
    alone: dict[str, float] = {}
    for count, way in wanted:
        tasks = list(loaded.folders)[:count]
        if way == ALONE:
            for task in tasks:
                if task not in alone:
                    alone |= loaded.judge(loaded.deltas(task), [task])
            case: dict[str, Any] = {"accuracy": {task: alone[task] for task in tasks}}
        elif way == BASE:
            case = {"accuracy": loaded.judge({}, tasks)}
        else:
            scale = scales[key_of(count, way)]
            started = time.perf_counter()
            deltas = WAYS[way].merge(loaded, tasks, setting.rank)
            seconds = time.perf_counter() - started
            accuracy = loaded.judge(deltas, tasks, scale)
            case = {"accuracy": accuracy, "scale": scale, "seconds": seconds}
        record.put(key_of(count, way), case)
        click.echo(f"{name} {seed}, {key_of(count, way)}: {100 * mean(case['accuracy']):.1f}")


def columns(folder: Path) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    """The seeds' cases by setting and number of adapters, as far as they are whole."""
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for name, setting in SETTINGS.items():
        paths = [folder / f"{name}-{seed}.json" for seed in SEEDS]
        records = [json.loads(path.read_text()) for path in paths if path.exists()]
        for count in setting.counts:
            whole = [
                record
                for record in records
                if all(
                    key_of(count, way) in record["cases"] for way in (BASE, ALONE, *ways_for(count))
                )
            ]
            if whole:
                found[name, count] = whole
    return found


def at_their_ends(folder: Path) -> str:
    """Which ways are best at the least or largest of several scales that were tried."""
    found = []
    for name in SETTINGS:
        path = folder / f"{name}-validation.json"
        cases = json.loads(path.read_text())["cases"] if path.exists() else {}
        for key, scores in cases.items():
            scales = sorted(map(float, scores))
            best = float(max(scores, key=lambda one: scores[one]))
            if len(scales) > 1 and best in (scales[0], scales[-1]):
                count, _, way = key.partition(": ")
                found.append(f"{way} ({heading(name, int(count))}: {best:g})")
    return f"at an end of the scales tried: {', '.join(found)}" if found else "none at an end"


def heading(name: str, count: int, seeds: int | None = None) -> str:
    """Of a column."""
    setting = SETTINGS[name]
    over = "" if seeds is None else f", {seeds} seeds" if seeds > 1 else ", 1 seed"
    if setting.suite == "language":
        return f"{count}, {'one start' if setting.one_start else 'own starts'}{over}"
    return f"{count} of rank {setting.rank}{over}"


def rank_text(ranks: int | None) -> str:
    """How the result's rank is written."""
    return "all" if ranks is None else "r" if ranks == 1 else f"{ranks} r"


def markdown(folder: Path) -> str:
    """A table a suite: a row a way, a column a setting and number of adapters."""
    held = columns(folder)
    measured = [
        one for records in held.values() for record in records for one in record["measured"]
    ]
    ends = at_their_ends(folder)
    parts = [
        f"Test accuracy in per cent ({EXAMPLES['test']} examples a task) of several LoRA adapters "
        "merged into one, mean over training seeds ± standard error; all: the sum of the adapters' "
        "ranks. PEFT's ways (density 0.2) and the published ones chose their scale on the "
        f"validation split of the first seed; {ends}. {made_by('bench-adapters', measured)}"
    ]
    for suite in ("language", "images"):
        own = {key: one for key, one in held.items() if SETTINGS[key[0]].suite == suite}
        if not own:
            continue
        best = {key: max(ways_for(key[1]), key=partial(_mean_of, own, key)) for key in own}
        rows = []
        for way in (BASE, ALONE, *WAYS):
            merged = WAYS.get(way)
            cells = [_cell(own, key, way, bold=best[key] == way) for key in own]
            rows.append([way, "" if merged is None else rank_text(merged.ranks), *cells])
        heads = [heading(name, count, len(own[name, count])) for name, count in own]
        ruler = ["---", "---:", *["---:"] * len(heads)]
        parts.append(markdown_table([suite, "rank", *heads], rows, ruler))
    return "\n\n".join(parts) + "\n"


def _means(held: Mapping[Any, Any], key: tuple[str, int], way: str) -> list[float]:
    return [mean(one["cases"][key_of(key[1], way)]["accuracy"]) for one in held[key]]


def _mean_of(held: Mapping[Any, Any], key: tuple[str, int], way: str) -> float:
    return statistics.fmean(_means(held, key, way))


def _cell(held: Mapping[Any, Any], key: tuple[str, int], way: str, *, bold: bool) -> str:
    if way in WAYS and way not in ways_for(key[1]):
        way = ALL  # of so few adapters that rank is all
    return percent_cell(_means(held, key, way), bold=bold)


@click.command()
@workers_option
@out_option("adapters")
@report_option
@click.option("--settings", default=",".join(SETTINGS), show_default=True, help="Which.")
@click.option("--seeds", default=",".join(map(str, SEEDS)), show_default=True, help="Which.")
def main(workers: int, out: Path, only_report: bool, settings: str, seeds: str) -> None:
    """Merge adapters in many ways, and judge the models that have them."""
    folder = out / "accuracy"
    if not only_report:
        names = settings.split(",")
        in_processes([partial(tune, name, folder) for name in names], workers)
        todo = [
            partial(test, name, int(seed), folder) for name in names for seed in seeds.split(",")
        ]
        in_processes(todo, workers)
    (out / "accuracy.md").write_text(markdown(folder))
    click.echo((out / "accuracy.md").read_text())


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.adapters.accuracy")
