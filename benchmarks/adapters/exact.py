"""`python -m benchmarks.adapters.exact`: merged adapters beside merged models that have them.

The exact form of `merge_adapters` (all ranks) is what `cart_auto` makes of the whole models with
their base, of the LLM suite's adapters: how far apart are the two, weight by weight?
"""

from __future__ import annotations

import os
from pathlib import Path

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from rich.console import Console

from benchmarks.adapters.accuracy import SEEDS, SETTINGS
from benchmarks.adapters.loaded import Loaded
from benchmarks.adapters.ways import WAYS
from benchmarks.common.commands import out_option, publish
from benchmarks.common.provenance import made_by
from benchmarks.common.record import MERGES_ADAPTERS, Record, conditions
from benchmarks.common.tables import markdown_table
from cart_plugin import CartSettings, merge_tensors

STARTS = {"language-one": "one start", "language-own": "starts of their own"}
EXACT = "auto, all ranks"


def apart(loaded: Loaded, rank: int) -> dict[str, float]:
    """How far merged adapters are from merged models, over all weights.

    Returns:
        The largest difference of two entries, the largest change of the base, and the Frobenius
        norm of the difference over that of the change.
    """
    tasks = list(loaded.folders)
    merged = WAYS[EXACT].merge(loaded, tasks, rank)
    changes = {task: loaded.deltas(task) for task in tasks}
    largest = change = 0.0
    far = all_of_it = 0.0
    for name, layer in loaded.layers.items():
        base = layer.get_base_layer().weight.detach()
        tensors = [base + changes[task][name] for task in tasks]
        whole = merge_tensors(tensors, CartSettings(lambda_="auto"), base=base, name="a.weight")
        expected = whole - base
        lacking = (merged[name] - expected).double()
        largest = max(largest, float(lacking.abs().max()))
        change = max(change, float(expected.abs().max()))
        far += float(lacking.square().sum())
        all_of_it += float(expected.double().square().sum())
    return {"largest": largest, "change": change, "relative": (far / all_of_it) ** 0.5}


def markdown(record: Record) -> str:
    """The table."""
    rows = []
    for name, title in STARTS.items():
        for seed in SEEDS:
            if case := record.cases.get(f"{name} {seed}"):
                figures = [f"{case[key]:.1e}" for key in ("largest", "change", "relative")]
                rows.append([title, str(seed), *figures])
    heading = ["four adapters of", "seed", "largest difference", "largest change", "relative"]
    table = markdown_table(heading, rows, ["---", *["---:"] * 4])
    return (
        "The exact form of merged adapters beside `cart_auto` of whole models and their base in "
        "fp32: the largest difference of two entries, the largest change of the base, and the "
        "Frobenius norm of all differences over that of all changes. "
        f"{made_by('bench-adapters', record.measured)}\n\n{table}\n"
    )


@click.command()
@out_option("adapters")
@click.option("--settings", default=",".join(STARTS), show_default=True, help="Which.")
@click.option("--seeds", default=",".join(map(str, SEEDS)), show_default=True, help="Which.")
def main(out: Path, settings: str, seeds: str) -> None:
    """Compare merged adapters with merged models."""
    known = conditions(MERGES_ADAPTERS, ("torch", "peft"), timed=False)
    record = Record(out / "exact.json", known)
    for name in settings.split(","):
        for seed in seeds.split(","):
            if (key := f"{name} {seed}") not in record.cases:
                with torch.no_grad():
                    loaded = SETTINGS[name].load(int(seed), "validation")
                    record.put(key, apart(loaded, SETTINGS[name].rank))
                click.echo(f"{key}: {record.cases[key]}")
    publish(markdown(record), out / "exact.md", Console())


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.adapters.exact")
