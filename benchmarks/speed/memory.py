"""Time and peak memory of `mergekit-yaml` with cart beside other methods: `make bench-memory`.

Four Llama-shaped models of 103 M parameters in bf16 and their base. Every method merges them with
the same command; the methods take turns, so that a change of the machine's load meets them all.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.common.cache import write_json
from benchmarks.common.llamas import llama_models
from benchmarks.common.measure import RESULTS, Measurement, machine, measure
from benchmarks.common.provenance import made_by, provenance
from benchmarks.common.tables import markdown_table

TUNED = 4

# The recipes differ in their methods and parameters only. "cart, no base" is the usual cart recipe:
# mergekit reads and holds a base model that a recipe names, whether the method uses it or not.
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "base": False, "parameters": {}},
    "ties": {"merge_method": "ties", "base": True, "parameters": {"density": 0.2}},
    "dare_ties": {"merge_method": "dare_ties", "base": True, "parameters": {"density": 0.5}},
    "cart": {"merge_method": "cart", "base": True, "parameters": {"rank_ratio": 0.08}},
    "cart, no base": {"merge_method": "cart", "base": False, "parameters": {"rank_ratio": 0.08}},
}


@click.command()
@click.option("--runs", default=3, show_default=True, help="Merges with each method.")
def main(runs: int) -> None:
    """Merge with every method in turn; the exit code is 1 if cart peaks above ties."""
    console, where = Console(), machine()
    base, *tuned = llama_models("llama-103m", TUNED, console)
    measured: dict[str, list[Measurement]] = {name: [] for name in METHODS}
    with tempfile.TemporaryDirectory(dir=base.parent) as folder, Progress(console=console) as bar:
        task = bar.add_task("merging", total=runs * len(METHODS))
        for _ in range(runs):
            for name, settings in METHODS.items():
                bar.update(task, description=f"merging: {name}")
                measured[name].append(_merge(Path(folder), settings, base, tuned))
                bar.advance(task)

    rows = {name: _summary(of_method) for name, of_method in measured.items()}
    versions = {name: version(name) for name in ("cart-plugin", "mergekit", "torch")}
    result = {
        "machine": where,
        "versions": versions,
        "measured": [provenance()],
        "runs": runs,
        "methods": rows,
    }
    write_json(RESULTS / "speed" / "merge_memory.json", result)
    (RESULTS / "speed" / "merge_memory.md").write_text(markdown(result))
    table = Table(title=f"mergekit-yaml, 4 models of 103 M parameters, medians of {runs}")
    for column in ("method", "wall", "CPU", "peak memory", "peaks of the runs"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, row in rows.items():
        figures = f"{row['wall_s']:.1f} s", f"{row['cpu_s']:.1f} s", f"{row['peak_mb']:.0f} MB"
        table.add_row(name, *figures, " ".join(f"{peak:.0f}" for peak in row["peaks_mb"]))
    console.print(table)
    if rows["cart"]["peak_mb"] > rows["ties"]["peak_mb"]:
        sys.exit(1)


def markdown(result: dict[str, Any]) -> str:
    """The result as a Markdown table, with a line that says what was merged and how."""
    runs, where = result["runs"], result["machine"]
    how = "one merge with each method" if runs == 1 else f"medians of {runs} merges a method"
    rows = [
        [name, f"{row['wall_s']:.1f}", f"{row['cpu_s']:.1f}", f"{row['peak_mb']:.0f}"]
        for name, row in result["methods"].items()
    ]
    heading, ruler = ["method", "wall s", "CPU s", "peak MB"], ["---", "---:", "---:", "---:"]
    return (
        f"`mergekit-yaml` on {TUNED} Llama-shaped models of 103 M parameters in bf16, {how}, "
        f"{where['cores']} cores ({where['processor']}). "
        f"{made_by('bench-memory', result['measured'])}\n\n"
        f"{markdown_table(heading, rows, ruler)}\n"
    )


def _merge(
    folder: Path, settings: dict[str, Any], base: Path, tuned: Sequence[Path]
) -> Measurement:
    """Merge once into a folder that is removed again."""
    lines = [f"merge_method: {settings['merge_method']}", "dtype: bfloat16", "models:"]
    for model in tuned:
        lines += [f"  - model: {model}", "    parameters: {weight: 1.0}"]
    if settings["base"]:
        lines.append(f"base_model: {base}")
    lines.append(f"parameters: {settings['parameters']}")
    recipe, out = folder / "recipe.yaml", folder / "out"
    recipe.write_text("\n".join(lines) + "\n")
    command = Path(sys.executable).with_name("mergekit-yaml")
    measured = measure(
        [command, recipe, out, "--no-write-model-card"],
        folder / "log.txt",
        # A thread that spins while it waits for others would count as work on a busy machine.
        {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )
    if not any(out.glob("*.safetensors")):
        raise click.ClickException(f"{settings['merge_method']} wrote no weights")
    shutil.rmtree(out)
    return measured


def _summary(runs: Sequence[Measurement]) -> dict[str, Any]:
    return {
        "wall_s": round(statistics.median(run.wall for run in runs), 2),
        "cpu_s": round(statistics.median(run.cpu for run in runs), 2),
        "peak_mb": round(statistics.median(run.peak for run in runs) / 1e6, 1),
        "peaks_mb": [round(run.peak / 1e6, 1) for run in runs],
    }


if __name__ == "__main__":
    main()
