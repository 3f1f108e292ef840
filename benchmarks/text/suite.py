"""`python -m benchmarks.text.suite` (`make bench-text`): merge methods of mergekit on eight texts.

Fine-tunes (or finds) one MiniLM a task and seed, then lets `mergekit-cart compare` do the rest:
each method's grid on the validation split of the first seed, the chosen setting on the test split
of every seed. All that is finished is found again, so that the same command goes on where it
stopped.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import yaml

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.measure import RESULTS
from benchmarks.tables import markdown_table
from benchmarks.text.backbone import prepare_backbone
from benchmarks.text.finetune import FineTuning, finetune_all
from benchmarks.text.tasks import SUITE, TASKS, prepare_task
from benchmarks.vision.cache import cache_root, write_json

# What each method may choose from on the validation split: at most twelve points. The weights are
# 1/8 each, but for cart, ties (which normalises) and model_stock (which has none).
GRIDS: dict[str, dict[str, Sequence[float]]] = {
    "linear": {},
    "task_arithmetic": {"lambda": (0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8)},
    "ties": {"density": (0.1, 0.2), "lambda": (0.5, 1, 1.5, 2, 3, 4)},
    "dare_linear": {"density": (0.2, 0.5), "lambda": (1, 1.5, 2, 3, 4, 6)},
    "dare_ties": {"density": (0.2, 0.5), "lambda": (1, 1.5, 2, 3, 4, 6)},
    "della": {"density": (0.2, 0.5), "lambda": (0.5, 1, 1.5, 2, 3, 4)},
    "model_stock": {},
    "sce": {"select_topk": (0.1, 0.2, 0.5, 1.0)},
    "cart": {"rank_ratio": (0.08, 0.16, 0.32), "lambda": (1, 2, 3, 4)},
}


def recipe(encoders: Mapping[str, Path], base: Path, folder: Path) -> Path:
    """A recipe that merges the encoders, written into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "merge_method": "cart",
        "base_model": str(base),
        "models": [{"model": str(path)} for path in encoders.values()],
        "dtype": "float32",
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def compare(
    made: Path, split: str, out: Path, methods: Sequence[str], options: Sequence[str]
) -> dict[str, Any]:
    """Run `mergekit-cart compare` as a user does; return its report."""
    command = [sys.executable, "-m", "cart_plugin", "compare", str(made), "--out", str(out)]
    command += ["--evaluator", f"benchmarks.text.evaluator:{split}", "--keep-models", "none"]
    command += ["--methods", ",".join(methods), *options]
    subprocess.run(command, check=True)
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def grid_options(methods: Sequence[str]) -> list[str]:
    """The grids of some methods for the command line."""
    return [
        f"--grid={method}.{name}={','.join(f'{value:g}' for value in values)}"
        for method in methods
        for name, values in GRIDS[method].items()
    ]


def choose(report: Mapping[str, Any], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each method's settings with the best mean; a method that failed everywhere is left out."""
    chosen = {}
    for method in methods:
        rows = [
            row for row in report["rows"] if row["method"] == method and row["mean"] is not None
        ]
        if rows:
            best = max(rows, key=lambda row: row["mean"])
            chosen[method] = {name: best["settings"][name] for name in GRIDS[method]}
    return chosen


def run(
    tasks: Sequence[str], seeds: Sequence[int], methods: Sequence[str], workers: int, work: Path
) -> dict[str, Any]:
    """Do the suite; return the results as plain data."""
    base = prepare_backbone()
    for name in tasks:
        prepare_task(name)
    recipes = {
        seed: recipe(finetune_all(tasks, seed, workers=workers), base, work / f"seed{seed}")
        for seed in seeds
    }
    first = compare(
        recipes[seeds[0]],
        "validation",
        work / f"seed{seeds[0]}" / "validation",
        methods,
        grid_options(methods),
    )
    chosen = choose(first, methods)
    options = [
        f"--set={method}.{name}={value}"
        for method, point in chosen.items()
        for name, value in point.items()
    ]
    tests = {
        seed: compare(recipes[seed], "test", work / f"seed{seed}" / "test", list(chosen), options)
        for seed in seeds
    }
    return {
        "tasks": {name: TASKS[name].title for name in tasks},
        "seeds": list(seeds),
        "fine_tuning": asdict(FineTuning()),
        "data": {name: prepare_task(name).name for name in tasks},
        "grids": {method: GRIDS[method] for method in methods},
        "chosen": chosen,
        "versions": first["versions"],
        "validation": [_slim(row) for row in first["rows"]],
        "test": {seed: [_slim(row) for row in report["rows"]] for seed, report in tests.items()},
    }


def _slim(row: Mapping[str, Any]) -> dict[str, Any]:
    accuracy = {name: entry["value"] for name, entry in row["metrics"].items()}
    kept = ("name", "kind", "method", "settings", "error", "note", "merge_seconds")
    return {**{name: row[name] for name in kept}, "accuracy": accuracy}


def lines(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table's rows: accuracy by task, over the seeds, and the mean with its standard error."""
    names = list(results["tasks"])
    found: dict[str, list[dict[str, float]]] = {}
    for rows in results["test"].values():
        individual = {}
        for row in rows:
            if row["kind"] == "base":
                found.setdefault("pretrained", []).append(row["accuracy"])
            elif row["kind"] == "model":
                own = next(name for name in names if row["name"].startswith(f"input-{name}-"))
                individual[own] = row["accuracy"][own]
            elif not row["error"]:
                found.setdefault(row["method"], []).append(row["accuracy"])
        found.setdefault("fine-tuned", []).append(individual)
    table = []
    for key, seeds in found.items():
        means = [statistics.fmean(seed[name] for name in names) for seed in seeds]
        error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None
        table.append(
            {
                "name": key,
                "accuracy": {
                    name: statistics.fmean(seed[name] for seed in seeds) for name in names
                },
                "mean": statistics.fmean(means),
                "stderr": error,
                "chosen": results["chosen"].get(key, {}),
            }
        )
    return sorted(table, key=lambda line: line["mean"])


def write_report(results: Mapping[str, Any], out: Path) -> None:
    """Write `results.json` and `table.md`."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", dict(results))
    table = lines(results)
    whole = next(line["mean"] for line in table if line["name"] == "fine-tuned")
    rows = [
        [
            line["name"],
            *(f"{100 * value:.1f}" for value in line["accuracy"].values()),
            f"{100 * line['mean']:.1f}"
            + ("" if line["stderr"] is None else f" ± {100 * line['stderr']:.1f}"),
            f"{100 * line['mean'] / whole:.0f} %",
            ", ".join(f"{name} {value:g}" for name, value in line["chosen"].items()),
        ]
        for line in table
    ]
    header = ["method", *results["tasks"].values(), "mean", "of fine-tuned", "chosen"]
    ruler = ["---", *["---:"] * (len(header) - 2), "---"]
    text = markdown_table(header, rows, ruler)
    count = len(results["seeds"])
    (out / "table.md").write_text(
        f"Test accuracy in per cent, mean of {count} fine-tuning seeds ± standard error. Settings "
        "were chosen on the validation split of the first seed. Made by `make bench-text`.\n\n"
        f"{text}\n"
    )


@click.command()
@click.option("--tasks", default=",".join(SUITE), help="Tasks, by name.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Of the fine-tuning.")
@click.option("--methods", default=",".join(GRIDS), help="Merge methods; all by default.")
@click.option("--workers", default=2, show_default=True, help="Processes that fine-tune.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=RESULTS / "text", help="Results' folder."
)
def main(tasks: str, seeds: str, methods: str, workers: int, out: Path) -> None:
    """Compare mergekit's methods on the text suite."""
    work = cache_root() / "text-suite"
    results = run(
        tasks.split(","),
        [int(seed) for seed in seeds.split(",")],
        methods.split(","),
        workers,
        work,
    )
    write_report(results, out)
    click.echo((out / "table.md").read_text())


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.text.suite")
