"""`python -m benchmarks.theory.cost`: what `mergekit-cart inspect` costs, beside a merge.

Four Llama-shaped models of 1024 hidden and 8 layers, in bf16, inspected and merged by `cart`
through `mergekit-yaml`, each with the base and without it. The commands take turns, so that a
change of the machine's load meets them all, and ratios are taken within a turn.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import yaml
from rich.console import Console

from benchmarks.common.cache import write_json
from benchmarks.common.commands import (
    out_option,
    progress,
    publish,
    quick_option,
    report_option,
    runs_option,
)
from benchmarks.common.llamas import llama_models
from benchmarks.common.measure import LlamaShape, Measurement, machine, measure
from benchmarks.common.provenance import made_by, provenance
from benchmarks.common.tables import markdown_table

TUNED = 4
SHAPE = LlamaShape(hidden=1024, intermediate=2816, layers=8, heads=16)
TINY = LlamaShape(hidden=64, intermediate=128, layers=2, heads=2, vocabulary=100)
MERGE, INSPECT = "mergekit-yaml, cart", "mergekit-cart inspect"
BASES = ("", ", with the base")
BARS = {"time": 2.5, "memory": 1.0}


@click.command()
@runs_option(3)
@quick_option
@out_option("theory")
@report_option
def main(runs: int, quick: bool, out: Path, only_report: bool) -> None:
    """Merge and inspect in turns; the exit code is 1 if inspecting costs more than it may."""
    console = Console()
    path = out / "cost.json"
    if not only_report:
        for result in measured(runs, TINY if quick else SHAPE, console):
            write_json(path, result)  # after each turn: what is cut off leaves whole ones
    result = json.loads(path.read_text())
    publish(markdown(result), out / "cost.md", console)
    if any(entry[what] > bar for entry in ratios(result).values() for what, bar in BARS.items()):
        sys.exit(1)


def measured(runs: int, shape: LlamaShape, console: Console) -> Iterator[dict[str, Any]]:
    """Run all commands in turns; give what is known after each."""
    where = machine()
    name = f"llama-{shape.hidden}-{shape.layers}"
    base, *tuned = llama_models(name, TUNED, console, shape)
    rounds: list[dict[str, Any]] = []
    names = [f"{what}{suffix}" for suffix in BASES for what in (MERGE, INSPECT)]
    with tempfile.TemporaryDirectory(dir=base.parent) as folder, progress(console) as bar:
        task = bar.add_task("", total=runs * len(names))
        for _ in range(runs):
            found = {}
            for name in names:
                bar.update(task, description=name)
                found[name] = asdict(_run(name, base, tuned, Path(folder)))
                bar.advance(task)
            rounds.append(found)
            yield {
                "machine": where,
                "shape": asdict(shape),
                "rounds": rounds,
                "measured": [provenance()],
            }


def _run(name: str, base: Path, tuned: Sequence[Path], folder: Path) -> Measurement:
    """Do one of the commands, into a folder that is removed again."""
    recipe, out = folder / "recipe.yaml", folder / "out"
    document: dict[str, Any] = {
        "merge_method": "cart",
        "dtype": "bfloat16",
        "models": [{"model": str(model)} for model in tuned],
        "parameters": {"rank_ratio": 0.08},
    }
    if name.endswith(BASES[1]):
        document["base_model"] = str(base)
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    programs = Path(sys.executable).parent
    commands: dict[str, list[str | Path]] = {
        MERGE: [programs / "mergekit-yaml", recipe, out, "--no-write-model-card"],
        INSPECT: [programs / "mergekit-cart", "inspect", recipe, "--out", out],
    }
    found = measure(
        commands[name.removesuffix(BASES[1])],
        folder / "log.txt",
        # A thread that spins while it waits for others would count as work on a busy machine.
        {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )
    if not any(out.glob("*.safetensors")) and not (out / "report.json").exists():
        raise click.ClickException(f"{name} wrote nothing")
    shutil.rmtree(out)
    return found


def ratios(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What inspecting needs for each second and byte of a merge: medians of the turns."""
    return {
        suffix: {
            what: statistics.median(
                one[INSPECT + suffix][key] / one[MERGE + suffix][key] for one in result["rounds"]
            )
            for what, key in (("time", "wall"), ("cpu", "cpu"), ("memory", "peak"))
        }
        for suffix in BASES
    }


def markdown(result: Mapping[str, Any]) -> str:
    """A row a command, medians of the turns."""
    rounds, where, shape = result["rounds"], result["machine"], result["shape"]
    rows = []
    for suffix in BASES:
        for what in (MERGE, INSPECT):
            own = [one[what + suffix] for one in rounds]
            wall, cpu, peak = (
                statistics.median(run[key] for run in own) for key in ("wall", "cpu", "peak")
            )
            times = ratios(result)[suffix]
            compared = (
                (f"{times['time']:.2f}", f"{times['memory']:.2f}") if what == INSPECT else ("", "")
            )
            rows.append(
                [what + suffix, f"{wall:.1f}", f"{cpu:.1f}", f"{peak / 1e6:.0f}", *compared]
            )
    heading = ["command", "wall s", "CPU s", "peak MB", "time, of a merge's", "memory"]
    turns = "one turn" if len(rounds) == 1 else f"medians of {len(rounds)} turns"
    return (
        f"{TUNED} Llama-shaped models of {shape['hidden']} hidden and {shape['layers']} layers in "
        f"bf16, {turns}, {where['cores']} cores ({where['processor']}, load "
        f"{where['load_average']} before). {made_by('bench-theory', result['measured'])}\n\n"
        f"{markdown_table(heading, rows, ['---', *['---:'] * 5])}\n"
    )


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.theory.cost")
