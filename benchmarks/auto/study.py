"""`python -m benchmarks.auto.study`: CART without hyperparameters beside its base model.

Variants of the closed form, each another one in one respect, and other ways to merge, on the
validation splits of the image and the text suite, for two tasks and more. No test split is read.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor

from benchmarks.auto import informed
from benchmarks.auto.informed import Informed, combine
from benchmarks.auto.members import (
    OVERLAPPING,
    Member,
    Sets,
    by_name,
    heading,
    judge,
    members_of,
    needed,
)
from benchmarks.auto.search import key_of
from benchmarks.common import peers
from benchmarks.common.commands import named, out_option, report_option, workers_option
from benchmarks.common.data_free import tsvm
from benchmarks.common.provenance import made_by
from benchmarks.common.record import Record, conditions
from benchmarks.common.tables import markdown_table
from benchmarks.common.training import in_processes
from benchmarks.suites import GENTLE, Encoders, load_encoders
from cart_plugin.linalg.factors import LowRank

GENTLY = "vision, gentle"
SUITES = {"vision": ("vision", False), "text": ("text", False), GENTLY: ("vision", True)}
SEEDS = (0, 1)
EXAMPLES = 100  # a task
SCALES = (0.3, 0.5, 1.0)  # of task arithmetic
PACKAGES = ("torch", "transformers")
Factors = Mapping[str, Mapping[Member, LowRank]]

Way = Callable[[Sequence[LowRank]], Tensor]


def _scaled_sum(scale: float, tasks: Sequence[LowRank]) -> Tensor:
    return scale * sum((task.dense() for task in tasks), torch.zeros(()))


def _average(tasks: Sequence[LowRank]) -> Tensor:
    return _scaled_sum(1 / len(tasks), tasks)


def _of_taus(method: Callable[[Sequence[Tensor]], Tensor], tasks: Sequence[LowRank]) -> Tensor:
    return method([task.dense() for task in tasks])


def task_arithmetic(scale: float) -> str:
    """Names task arithmetic of one scale."""
    return f"task arithmetic, {scale:g}"


DEFAULT = Informed()
VARIANTS: dict[str, dict[str, Informed]] = {
    "the method": {"its defaults": DEFAULT},
    "source of the covariances": {"differences from the mean": Informed(source="mean")},
    "the average's inputs in each task's": {
        "none": DEFAULT,
        "whole": Informed(others=1.0),
        "whole, equal largest eigenvalues, ridge 1": Informed(
            others=1.0, norm="spectral", ridge=1.0
        ),
    },
    "ridge": {f"{ridge:g}": Informed(ridge=ridge) for ridge in (0.03, 0.1, 0.3, 1.0)},
    "mean eigenvalue over": {
        "directions that are known": DEFAULT,
        "all directions": Informed(over="all"),
    },
    "least rho": {
        "0.1": Informed(least=0.1),
        "0.3": DEFAULT,
        "1": Informed(least=1.0),
    },
    "pull towards": {
        "the base": Informed(pull="zero"),
        "the mean": Informed(pull="mean"),
        "the mean and what each lacks": DEFAULT,
        "the mean over kappa": Informed(pull="strong"),
        "the sum": Informed(pull="sum"),
        "TSV-M": Informed(pull="tsvm"),
        "CART's sum over rho": Informed(pull="cart"),
    },
    "cut": {
        "0.08": Informed(rank=0.08),
        "0.16": Informed(rank=0.16),
        "0.24": DEFAULT,
        "0.32": Informed(rank=0.32),
        "0.48": Informed(rank=0.48),
        "none": Informed(rank=None),
    },
    "covariances divided by": {
        "their trace": DEFAULT,
        "their largest eigenvalue": Informed(norm="spectral"),
    },
    "filter": {
        "ridge": DEFAULT,
        "exponential": Informed(keep="exponential"),
        "hard": Informed(keep="hard"),
    },
    "afterwards": {"rescaled as SVC does": Informed(rescaled=True)},
}
OTHERS: dict[str, Way] = {
    "average": _average,
    **{task_arithmetic(scale): partial(_scaled_sum, scale) for scale in SCALES},
    "TSV-M": tsvm,
    "ASWUDI": partial(_of_taus, peers.aswudi),
    "SWUDI": partial(_of_taus, peers.swudi),
    "ACE": partial(_of_taus, peers.ace),
    "DC-Merge": partial(_of_taus, peers.dc_merge),
}


def ways() -> dict[str, Way]:
    """All that is compared, by key; a variant's says all that it is."""
    keyed: dict[str, Way] = dict(OTHERS)
    for group in VARIANTS.values():
        keyed |= {key_of(variant): partial(combine, variant=variant) for variant in group.values()}
    return keyed


def open_record(
    path: Path,
    packages: Sequence[str],
    spared: Mapping[str, Callable[[str], bool]],
    known: Mapping[str, Any],
) -> Record:
    """The record of merges by the plugin and by peers, untimed.

    Args:
        path: of its file.
        packages: see `conditions`.
        spared: see `Record`.
        known: the conditions that are its own.
    """
    found = conditions(("linalg", "merging"), packages, timed=False, peers=peers.REVISION, **known)
    return Record(path, found, spared=spared)


def sets_in(setting: str) -> Sets:
    """What is merged of a setting."""
    suite, gentle = SUITES[setting]
    sets = members_of(suite)
    return {count: one for count, one in sets.items() if not (gentle and count == OVERLAPPING)}


def file_of(setting: str, seed: int, folder: Path) -> Path:
    """Of a record."""
    return folder / f"{setting.replace(', ', '-')}-{seed}.json"


def study(setting: str, seed: int, folder: Path) -> None:
    """Judge everything of one setting and seed; what is known is not done again."""
    # Neither the plugin nor the variants decide what the others merge.
    spared = dict.fromkeys(("revisions", "variants"), OTHERS.__contains__)
    known = {"examples": EXAMPLES, "variants": informed.REVISION}
    record = open_record(file_of(setting, seed, folder), PACKAGES, spared, known)
    missing = {
        key: {
            count: chosen
            for count, chosen in sets_in(setting).items()
            if count not in record.cases.get(key, {})
        }
        for key in ways()
    }
    wanted = {key: sets for key, sets in missing.items() if sets}
    if not wanted:
        return
    suite, gentle = SUITES[setting]
    sets = {count: chosen for sets in wanted.values() for count, chosen in sets.items()}
    held = [
        load_encoders(suite, (seed + offset) % len(SEEDS), "validation", EXAMPLES, tasks, gentle)
        for offset, tasks in enumerate(needed(suite, sets))
    ]
    base = held[0].base()
    factors = _factors(held, base)
    for key, sets in wanted.items():
        started = time.perf_counter()
        found: dict[str, list[dict[str, float]]] = {}
        for count, chosen in sets.items():
            found[count] = [
                by_name(judge(held, merge(held, base, factors, one, ways()[key]), one), one)
                for one in chosen
            ]
        record.put(key, {**record.cases.get(key, {}), **found}, adds=True)
        seconds = time.perf_counter() - started
        means = ", ".join(f"{count}: {100 * mean(found[count]):.1f}" for count in found)
        click.echo(f"{setting} {seed}: {means} | {key} ({seconds:.0f} s)")


def _factors(held: Sequence[Encoders], base: Mapping[str, Tensor]) -> Factors:
    """All singular directions of what each model changed, by tensor that is decomposed."""
    found: dict[str, dict[Member, LowRank]] = {}
    for offset, encoders in enumerate(held):
        for name, factors in encoders.factors(base).items():
            members = [(offset, task) for task in encoders.tuned]
            found.setdefault(name, {}).update(zip(members, factors, strict=True))
    return found


def merge(
    held: Sequence[Encoders],
    base: Mapping[str, Tensor],
    factors: Factors,
    members: Sequence[Member],
    way: Way,
) -> dict[str, Tensor]:
    """Merge some of the encoders; what is not decomposed is averaged."""
    merged = {}
    with torch.no_grad():
        for name, start in base.items():
            if name in factors:
                found = way([factors[name][one] for one in members])
                merged[name] = start + found.view(start.shape)
            else:
                tensors = [held[offset].tuned[task][name] for offset, task in members]
                merged[name] = torch.stack(tensors).mean(0)
    return merged


def mean(accuracies: Sequence[Mapping[str, float]]) -> float:
    """Over the sets of tasks, and over the tasks of each."""
    return statistics.fmean(statistics.fmean(one.values()) for one in accuracies)


def markdown(folder: Path) -> str:
    """The table: a row each, a column a suite and number of tasks."""
    records = {
        setting: [
            json.loads(path.read_text())
            for seed in SEEDS
            if (path := file_of(setting, seed, folder)).exists()
        ]
        for setting in SUITES
    }
    records = {setting: held for setting, held in records.items() if held}
    columns = [
        (setting, count)
        for setting, held in records.items()
        for count in sets_in(setting)
        if any(count in case for one in held for case in one["cases"].values())
    ]
    rows = [[title, "", *_cells(title, records, columns)] for title in OTHERS]
    for group, members in VARIANTS.items():
        for title, variant in members.items():
            bold = "**" if variant == DEFAULT else ""
            cells = _cells(key_of(variant), records, columns)
            rows.append([group, f"{bold}{title}{bold}", *cells])
    titles = [f"{setting}, {heading(count)}" for setting, count in columns]
    table = markdown_table(
        ["what varies", "value", *titles], rows, ["---", "---", *["---:"] * len(columns)]
    )
    measured = [one for held in records.values() for record in held for one in record["measured"]]
    seeds = ", ".join(f"{suite} {len(held)}" for suite, held in records.items())
    others = ""
    if any(count == OVERLAPPING for _, count in columns):
        others += "; overlapping: two models of one task and one of another, four times"
    if GENTLY in records:
        others += f"; {GENTLY}: a learning rate of {GENTLE:g}"
    return (
        f"Accuracy in per cent on the validation splits ({EXAMPLES} examples a task), by suite and "
        f"number of tasks (four pairs, two triples, and the first 4, 6 and 8{others}); fine-tuning "
        f"seeds: {seeds}; in brackets where it is fewer. {made_by('bench-auto', measured)}\n\n"
        f"{table}\n"
    )


def _cells(
    key: str, records: Mapping[str, Sequence[Mapping[str, Any]]], columns: Sequence[tuple[str, str]]
) -> list[str]:
    def cell(suite: str, count: str) -> str:
        known = [
            one["cases"][key][count] for one in records[suite] if count in one["cases"].get(key, {})
        ]
        if not known:
            return "-"
        seeds = sum(any(count in case for case in one["cases"].values()) for one in records[suite])
        few = "" if len(known) == seeds else f" ({len(known)})"
        return f"{100 * statistics.fmean(map(mean, known)):.1f}{few}"

    return [cell(suite, count) for suite, count in columns]


@click.command()
@workers_option
@out_option("auto")
@report_option
@click.option("--settings", default="vision,text", show_default=True, help="Suites.")
@click.option("--gentle", is_flag=True, help="Image models of a gentle fine-tuning, too, one seed.")
@click.option("--seeds", default=",".join(map(str, SEEDS)), show_default=True, help="Which.")
def main(
    workers: int, out: Path, only_report: bool, settings: str, gentle: bool, seeds: str
) -> None:
    """Judge ways to merge with a base model on the suites' validation splits."""
    folder = out / "study"
    pairs = [
        (name, int(seed))
        for seed in seeds.split(",")
        for name in named("--settings", settings, SUITES)
    ]
    pairs += [(GENTLY, SEEDS[0])] if gentle else []
    if not only_report:
        in_processes([partial(study, setting, seed, folder) for setting, seed in pairs], workers)
    (out / "study.md").write_text(markdown(folder))
    click.echo(markdown(folder))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.auto.study")
