"""`python -m benchmarks.auto.cost`: what CART without hyperparameters costs beside plain CART.

Whole `mergekit-yaml` runs on the models of `make bench-merge`, in turns: with a base model, too.
Four models with a base are merged by two forms, three by one.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from benchmarks.common.cache import cache_root
from benchmarks.common.commands import out_option, progress, publish, quick_option, runs_option
from benchmarks.common.provenance import made_by
from benchmarks.common.record import MERGES, Record, conditions
from benchmarks.common.tables import markdown_table
from benchmarks.speed import report
from benchmarks.speed.merges import METHODS, PACKAGES, Case, Models, model_sets, run_all

COUNTS = (3, 4)
TITLES = {
    "cart, auto": "cart, rank_ratio 0.08",
    "cart_auto": "cart_auto",
    "cart_auto, base": "cart_auto with the base",
}


def of_counts(
    models: Models | tuple[Path, ...], counts: Sequence[int]
) -> dict[int, Models | tuple[Path, ...]]:
    """Fewer of the models, by how many fine-tuned ones."""
    return {
        count: replace(models, tuned=count) if isinstance(models, Models) else models[: count + 1]
        for count in counts
    }


@click.command()
@runs_option(3)
@quick_option
@out_option("auto")
def main(runs: int, quick: bool, out: Path) -> None:
    """Measure merges by cart and by cart_auto, without and with the base."""
    console = Console()
    record = Record(out / "cost.json", conditions(MERGES, PACKAGES, quick=quick))
    cases = [
        Case(f"methods on {count} {name}", label, METHODS[label], fewer)
        for name, models in model_sets(console, quick).items()
        for count, fewer in of_counts(models, COUNTS).items()
        for label in TITLES
    ]
    with progress(console) as bar:
        run_all(cases, runs, record, bar)
    publish(markdown(record, runs), out / "cost.md", console)
    shutil.rmtree(cache_root() / "merge-speed", ignore_errors=True)


def markdown(record: Record, runs: int) -> str:
    """A row a set of models and method; the ratios are over plain cart's."""
    rows = []
    for name, points in report.series(record.cases, "methods on").items():
        plain = points["cart, auto"]
        for label, title in TITLES.items():
            of = points[label]
            cells = [f"{of['wall']:.1f}", f"{of['cpu']:.1f}", f"{of['peak']:.0f}"]
            ratios = [f"{of[key] / plain[key]:.2f}" for key in ("wall", "cpu", "peak")]
            rows.append([name.removeprefix("methods on "), title, *cells, *ratios])
    heading = ["models", "method", "wall s", "CPU s", "peak MB", "of wall", "of CPU", "of peak"]
    table = markdown_table(heading, rows, ["---", "---", *["---:"] * 6])
    machine = record.conditions["machine"]
    return (
        f"Whole `mergekit-yaml` runs, medians of {runs}, the methods in turns, on "
        f"{machine['processor']}, {machine['cores']} cores: Llama-shaped models of 1024 hidden "
        "and 8 layers in bf16, and the encoders of `make demo`, three and four of each. "
        f"{made_by('bench-auto', record.measured)}\n\n{table}\n"
    )


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.auto.cost")
