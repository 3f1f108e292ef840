"""`python -m benchmarks.adapters.cost`: seconds, memory and bytes of the ways to merge adapters.

Each way merges the LLM suite's four adapters in a process of its own, beside one that loads the
model and the adapters only: what is more at its peak is the way's. What it makes of them is not
multiplied out; the published ways are formulas of whole matrices and hold all of these.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.console import Console

from benchmarks.adapters import formulas
from benchmarks.adapters.accuracy import SETTINGS, rank_text
from benchmarks.adapters.ways import WAYS
from benchmarks.common.cache import cache_root
from benchmarks.common.commands import out_option, publish, runs_option
from benchmarks.common.measure import measure
from benchmarks.common.provenance import made_by
from benchmarks.common.record import MERGES_ADAPTERS, Record, conditions
from benchmarks.common.tables import markdown_table

SETTING = "language-own"
COUNT = 4
ONLY_LOADED = "only loaded"
# Not those that compare cuts of our own result, nor the rank that is all ranks of so few.
MEASURED = [
    name
    for name, way in WAYS.items()
    if not name.startswith(("auto cut", "auto in")) and way.ranks != COUNT
]
PACKAGES = ("torch", "peft", "transformers")


def work(way: str, seed: int = 0) -> dict[str, float]:
    """Merge in this process; a run of `measure`.

    Returns:
        Seconds of the merge, and the numbers that one adapter of its rank holds.
    """
    held = SETTINGS[SETTING].load(seed, "validation")
    held.multiplies = False
    tasks = list(held.folders)[:COUNT]
    rank = SETTINGS[SETTING].rank
    if way == ONLY_LOADED:
        return {"seconds": 0.0, "numbers": 0}
    started = time.perf_counter()
    WAYS[way].merge(held, tasks, rank)
    seconds = time.perf_counter() - started
    ranks = WAYS[way].ranks
    sides = sum(sum(layer.get_base_layer().weight.shape) for layer in held.layers.values())
    return {"seconds": seconds, "numbers": rank * (COUNT if ranks is None else ranks) * sides}


def one_run(way: str) -> dict[str, float]:
    """A process of its own: seconds, megabytes at its peak, and numbers of the adapter."""
    log = cache_root() / "adapter-cost.log"
    command = [sys.executable, "-m", "benchmarks.adapters.cost", "--way", way]
    found = measure(command, log)
    return json.loads(log.read_text().splitlines()[-1]) | {"peak": found.peak / 2**20}


def markdown(cases: Mapping[str, Mapping[str, float]], record: Record, runs: int) -> str:
    """The table."""
    start = cases[ONLY_LOADED]["peak"]
    machine = record.conditions["machine"]
    rows = [
        [
            way,
            rank_text(WAYS[way].ranks),
            f"{cases[way]['seconds']:.1f}",
            f"{cases[way]['peak'] - start:.0f}",
            f"{4 * cases[way]['numbers'] / 2**20:.0f}",
        ]
        for way in MEASURED
    ]
    heading = ["", "rank", "seconds", "peak MB beside what is loaded", "MB of the adapter, fp32"]
    return (
        f"Four adapters of rank {SETTINGS[SETTING].rank} of a language model of 135 M parameters, "
        f"from starts of their own, merged in {len(MEASURED)} ways on {machine['processor']}, "
        f"{machine['cores']} cores, medians of {runs}. Ours read the folders and write one; PEFT's "
        "work on the loaded model; the published ones are formulas of whole matrices here, and "
        f"hold those of all layers. {made_by('bench-adapters', record.measured)}\n\n"
        + markdown_table(heading, rows, ["---", "---:", "---:", "---:", "---:"])
        + "\n"
    )


@click.command()
@runs_option(3)
@out_option("adapters")
@click.option("--way", type=click.Choice([ONLY_LOADED, *MEASURED]), help="In this process.")
def main(runs: int, out: Path, way: str | None) -> None:
    """Measure what merging adapters costs, way by way."""
    if way is not None:
        click.echo(json.dumps(work(way)))
        return
    known = conditions(MERGES_ADAPTERS, PACKAGES, runs=runs, formulas=formulas.REVISION)
    record = Record(out / "cost.json", known)
    for name in (ONLY_LOADED, *MEASURED):
        if name not in record.cases:
            taken: list[dict[str, Any]] = [one_run(name) for _ in range(runs)]
            record.put(name, {key: statistics.median(x[key] for x in taken) for key in taken[0]})
            click.echo(f"{name}: {record.cases[name]['seconds']:.1f} s")
    publish(markdown(record.cases, record, runs), out / "cost.md", Console())


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.adapters.cost")
