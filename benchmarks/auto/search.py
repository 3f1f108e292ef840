"""`python -m benchmarks.auto.search`: variants of the closed form on the validation splits.

Each variant differs from the plugin's defaults in one respect, but for CART itself and for the
group without the pull, which is where the method came from. Two fine-tuning seeds of the vision
and of the text suite judge it; no test split is read. `make bench-auto` runs this and `carry`.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from benchmarks.auto import variants
from benchmarks.auto.informed import Informed
from benchmarks.auto.variants import Variant, merge_factors
from benchmarks.common.commands import out_option, workers_option
from benchmarks.common.provenance import made_by
from benchmarks.common.record import Record, conditions
from benchmarks.common.tables import markdown_table
from benchmarks.common.training import in_processes
from benchmarks.suites import load_encoders, task_order

SUITES = ("vision", "text")
SEEDS = (0, 1)
EXAMPLES = 100  # a task
PACKAGES = ("torch", "transformers")

VARIANTS: dict[str, dict[str, Variant]] = {
    "CART, for comparison": {
        f"rank {rank}, lambda {scale}": Variant("cart", rank, target=float(scale))
        for rank, scale in ((0.08, 1), (0.08, 2), (0.08, 3), (0.16, 2), (0.16, 3), (0.16, 4))
    },
    "the method": {"its defaults": Variant()},
    # The interference alone, and the ridge towards the centre.
    "no pull towards the sum": {
        f"ridge {ridge}, scale {scale}": Variant(ridge=ridge, scale=scale, pull=0.0)
        for ridge, scale in (
            *((0.03, 1.0), (0.1, 1.0), (0.1, 1.3), (0.3, 1.0), (0.3, 1.3), (1.0, 1.0)),
            *((0.3, "ridge"), (0.3, "explained"), (0.3, "response"), (0.3, "trace")),
        )
    }
    | {"ridge 0.1, all directions": Variant(ridge=0.1, rank=None, pull=0.0)}
    | {"ridge 0.3, all directions, scale 1.3": Variant(ridge=0.3, rank=None, scale=1.3, pull=0.0)},
    "scale of that sum": {
        **{f"{scale:g}": Variant(target=scale) for scale in (1.0, 2.0, 4.0)},
        "1 / sqrt(rho)": Variant(target="norm"),
        "1 / rho": Variant(),
        "1 / rho, at most 5": Variant(least=0.2),
        "1 / rho, at most 20": Variant(least=0.05),
        "1 / rho, at most 50": Variant(least=0.02),
    },
    "that sum alone (CART), scale": {
        f"{scale:g} / rho": Variant("cart", scale=scale) for scale in (0.5, 0.65, 1.0)
    },
    "ridge and pull": {
        f"{ridge:g}": Variant(ridge=ridge, pull=ridge) for ridge in (0.1, 0.3, 0.5, 1.0, 2.0, 4.0)
    },
    "rank": {
        **{f"{rank:g}": Variant(rank=rank) for rank in (0.04, 0.08, 0.12, 0.16, 0.24, 0.32)},
        "all": Variant(rank=None),
        "Gavish and Donoho's threshold": Variant(rank="donoho"),
        "90 % of the energy": Variant(rank="energy"),
        "the same, at most 0.16": Variant(rank="both"),
    },
    "scale of the result": {f"{scale:g}": Variant(scale=scale) for scale in (0.85, 1.0, 1.15, 1.3)},
    "power of the singular values": {
        f"{power:g}": Variant(power=power) for power in (1.0, 1.5, 2.0, 3.0)
    },
    "covariances divided by": {norm: Variant(norm=norm) for norm in ("spectral", "trace", "none")},
    "side of the covariance": {side: Variant(side=side) for side in ("input", "output", "both")},
    "other ways to combine": {
        "solved twice": Variant(twice=True),
        "whitened as TSV-M": Variant("whitened"),
        "whitened as TSV-M, scale 1.5": Variant("whitened", scale=1.5),
        "one coefficient a task": Variant("coefficients"),
    },
}


def search(suite: str, seed: int, folder: Path) -> None:
    """Judge all variants on one suite and seed; what is known is not done again."""
    known = conditions(
        ("linalg", "merging"), PACKAGES, timed=False, variants=variants.REVISION, examples=EXAMPLES
    )
    record = Record(folder / f"{suite}-{seed}.json", known)
    todo = {
        key_of(variant): variant
        for group in VARIANTS.values()
        for variant in group.values()
        if key_of(variant) not in record.cases
    }
    if not todo:
        return
    tasks = task_order(suite)
    encoders = load_encoders(suite, seed, "validation", EXAMPLES, tasks)
    average = encoders.average()
    factors = encoders.factors(average)
    for key, variant in todo.items():
        started = time.perf_counter()
        with torch.no_grad():
            merged = average | {
                name: average[name] + merge_factors(each, variant).view(average[name].shape)
                for name, each in factors.items()
            }
        found = encoders.judge(merged, tasks)
        record.put(key, {"accuracy": found, "variant": asdict(variant)})
        mean = statistics.fmean(found.values())
        seconds = time.perf_counter() - started
        click.echo(f"{suite} {seed}: {100 * mean:5.1f} {key} ({seconds:.0f} s)")


def key_of(variant: Variant | Informed) -> str:
    """All that a variant is; names a case."""
    return ", ".join(f"{field.name}={getattr(variant, field.name)}" for field in fields(variant))


def means(records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean accuracy by variant's key, by suite and seed."""
    found: dict[str, dict[str, float]] = {}
    for column, record in records.items():
        for key, case in record["cases"].items():
            found.setdefault(key, {})[column] = statistics.fmean(case["accuracy"].values())
    return found


def markdown(folder: Path) -> str:
    """The table of all variants, a row each."""
    records = {
        f"{suite} {seed}": json.loads((folder / f"{suite}-{seed}.json").read_text())
        for suite in SUITES
        for seed in SEEDS
    }
    found, columns = means(records), list(records)
    rows = []
    for group, members in VARIANTS.items():
        for title, variant in members.items():
            values = found[key_of(variant)]
            by_suite = [
                statistics.fmean(values[f"{suite} {seed}"] for seed in SEEDS) for suite in SUITES
            ]
            default = "**" if variant == Variant() else ""
            cells = [f"{100 * value:.1f}" for value in (*by_suite, *(values[c] for c in columns))]
            rows.append([group, f"{default}{title}{default}", *cells])
    heading = ["what varies", "value", *SUITES, *columns]
    ruler = ["---", "---", *["---:"] * (len(heading) - 2)]
    measured = [one for record in records.values() for one in record["measured"]]
    return (
        f"Accuracy in per cent on the validation splits ({EXAMPLES} examples a task): means of "
        f"the seeds, and each seed. {made_by('bench-auto', measured)}\n\n"
        f"{markdown_table(heading, rows, ruler)}\n"
    )


@click.command()
@workers_option
@out_option("auto")
def main(workers: int, out: Path) -> None:
    """Judge variants of CART without hyperparameters on two suites' validation splits."""
    folder = out / "search"
    pairs: Sequence[tuple[str, int]] = [(suite, seed) for seed in SEEDS for suite in SUITES]
    in_processes([partial(search, suite, seed, folder) for suite, seed in pairs], workers)
    (out / "search.md").write_text(markdown(folder))
    click.echo(markdown(folder))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.auto.search")
