"""What the suites that go through `mergekit-cart compare` share: tuning, testing and the table.

Each method chooses its settings on the validation split of the first fine-tuning seed, from a grid
of at most eight points; the chosen setting is judged once, on the test split of every seed. All
that is finished is found again by `compare`, so that a suite goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import click
import yaml

from benchmarks.common.cache import write_json
from benchmarks.common.provenance import made_by, provenance
from benchmarks.common.tables import markdown_table
from cart_plugin.compare.steps import versions

# The weights are 1/number of models each, but for cart, ties (which normalises) and model_stock
# (which has none); a lambda of task arithmetic is so the sum of its usual scaling coefficients.
GRIDS: dict[str, dict[str, Sequence[float]]] = {
    "linear": {},
    "task_arithmetic": {"lambda": (0.5, 1, 1.5, 2, 3, 4, 6, 8)},
    "ties": {"density": (0.1, 0.2), "lambda": (0.5, 1, 2, 4)},
    "dare_linear": {"density": (0.2, 0.5), "lambda": (1, 2, 3, 4)},
    "dare_ties": {"density": (0.2, 0.5), "lambda": (1, 2, 3, 4)},
    "della": {"density": (0.2, 0.5), "lambda": (0.5, 1, 2, 4)},
    "model_stock": {},
    "sce": {"select_topk": (0.1, 0.2, 0.5, 1.0)},
    "cart": {"rank_ratio": (0.08, 0.16), "lambda": (1, 2, 3, 4)},
    "cart_auto": {},
}


@dataclass(frozen=True)
class Suite:
    """A comparison of merge methods on several tasks and fine-tuning seeds.

    Attributes:
        tasks: titles of the tasks by name.
        recipes: one for each fine-tuning seed; the first seed's is the one that is tuned on.
        evaluator: the options of `compare` that judge a split (`validation` or `test`).
        work: the folder of all comparisons.
        grids: of the methods, by name.
        beside: makes, of a seed, the models that are merged by other tools than mergekit, with
            nothing to tune; in folders called by their method and a hash.
    """

    tasks: Mapping[str, str]
    recipes: Mapping[int, Path]
    evaluator: Callable[[str], Sequence[str]]
    work: Path
    grids: Mapping[str, Mapping[str, Sequence[float]]]
    beside: Callable[[int], Sequence[Path]] = lambda _: ()

    def run(self, workers: int) -> dict[str, Any]:
        """Tune and test all methods, `workers` comparisons at a time; return the results."""
        chosen, rows = self.tune(workers)
        return self.results(chosen, rows, self.test(chosen, workers))

    def results(
        self,
        chosen: Mapping[str, Any],
        validation: Sequence[Mapping[str, Any]],
        test: Mapping[int, Sequence[Mapping[str, Any]]],
    ) -> dict[str, Any]:
        """What `tune` and `test` found, as `write_results` takes it."""
        return {
            "tasks": dict(self.tasks),
            "seeds": list(self.recipes),
            "grids": {method: dict(grid) for method, grid in self.grids.items()},
            "chosen": dict(chosen),
            "versions": versions(),
            "validation": list(validation),
            "test": dict(test),
        }

    def tune(self, workers: int) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
        """Judge all grids on the validation split; return the best settings, and the rows."""
        first = next(iter(self.recipes))
        reports = in_threads(
            [
                partial(self._compare, first, "validation", methods, self._grid_options(methods))
                for methods in _deal(self.grids, workers)
            ],
            workers,
        )
        rows = list({row["name"]: row for report in reports for row in report["rows"]}.values())
        return choose(rows, self.grids), [self._slim(row, "validation") for row in rows]

    def test(
        self, chosen: Mapping[str, Mapping[str, Any]], workers: int
    ) -> dict[int, list[dict[str, Any]]]:
        """Judge methods at their chosen settings on the test split of every seed."""
        options = [
            f"--set={method}.{name}={value}"
            for method, point in chosen.items()
            for name, value in point.items()
        ]

        def judged(seed: int) -> dict[str, Any]:
            also = [f"--also={folder}" for folder in self.beside(seed)]
            return self._compare(seed, "test", list(chosen), [*options, *also])

        reports = in_threads([partial(judged, seed) for seed in self.recipes], workers)
        return {
            seed: [self._slim(row, "test") for row in report["rows"]]
            for seed, report in zip(self.recipes, reports, strict=True)
        }

    def _grid_options(self, methods: Sequence[str]) -> list[str]:
        return grid_options({method: self.grids[method] for method in methods})

    def _compare(
        self, seed: int, split: str, methods: Sequence[str], options: Sequence[str]
    ) -> dict[str, Any]:
        name = f"seed{seed}-{split}" + (f"-{methods[0]}" if split == "validation" else "")
        out = self.work / name
        command = [sys.executable, "-m", "cart_plugin", "compare", str(self.recipes[seed])]
        command += ["--out", str(out), *self.evaluator(split), "--keep-models", "none"]
        command += ["--methods", ",".join(methods), *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
            for line in running.stdout or ():
                click.echo(f"{name}: {line.rstrip()}")
        if running.returncode:
            raise click.ClickException(f"the comparison {name} failed")
        report: dict[str, Any] = json.loads((out / "report.json").read_text())
        failed = [f"{row['name']}: {row['error']}" for row in report["rows"] if row["error"]]
        if failed:  # a mean over what is left would not say so
            raise click.ClickException(f"{name}: {'; '.join(failed)}")
        return report

    def _slim(self, row: Mapping[str, Any], split: str) -> dict[str, Any]:
        metrics = {name.removesuffix(f"_{split}"): entry for name, entry in row["metrics"].items()}
        kept = ("name", "kind", "method", "settings", "error", "note", "merge_seconds")
        return {
            **{name: row[name] for name in kept},
            "accuracy": {name: entry["value"] for name, entry in metrics.items()},
            "stderr": {name: entry["stderr"] for name, entry in metrics.items()},
        }


def write_recipe(
    models: Mapping[str, str | Path], base: Path, folder: Path, **settings: Any
) -> Path:
    """A recipe that merges the models, written into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "merge_method": "cart",
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models.values()],
        "dtype": "float32",
        **settings,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def share_cores(workers: int) -> None:
    """Have the child processes of `workers` comparisons share the cores without spinning."""
    threads = max(1, (os.cpu_count() or 1) // max(1, workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def grid_options(grids: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Grids for the command line of `compare`."""
    return [
        f"--grid={method}.{name}={','.join(f'{value:g}' for value in values)}"
        for method, grid in grids.items()
        for name, values in grid.items()
    ]


def choose(
    rows: Sequence[Mapping[str, Any]], grids: Mapping[str, Mapping[str, Sequence[float]]]
) -> dict[str, dict[str, Any]]:
    """Each method's settings with the best mean; a method that failed everywhere is left out."""
    chosen = {}
    for method, grid in grids.items():
        own = [row for row in rows if row["method"] == method and row["mean"] is not None]
        if own:
            best = max(own, key=lambda row: row["mean"])
            chosen[method] = {name: best["settings"][name] for name in grid}
    return chosen


def _deal(grids: Mapping[str, Mapping[str, Sequence[float]]], hands: int) -> list[list[str]]:
    """The methods in `hands` lists of about equally many grid points."""
    points = {method: prod(map(len, grid.values())) for method, grid in grids.items()}
    dealt: list[list[str]] = [[] for _ in range(max(1, min(hands, len(points))))]
    for method in sorted(points, key=lambda name: -points[name]):
        min(dealt, key=lambda hand: sum(points[name] for name in hand)).append(method)
    return dealt


def in_threads(jobs: Sequence[Callable[[], Any]], workers: int) -> list[Any]:
    """Run jobs, each of which waits for a process of its own; return their results in order."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return [running.result() for running in [pool.submit(job) for job in jobs]]


def lines(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table's rows, by mean: accuracy by task over the seeds, and the mean's standard error.

    The error is that between the seeds; with one seed it is that of the test examples.
    """
    names = list(results["tasks"])
    found: dict[str, list[dict[str, Any]]] = {}
    for rows in results["test"].values():
        individual: dict[str, dict[str, float]] = {"accuracy": {}, "stderr": {}}
        for row in rows:
            if row["kind"] == "base":
                found.setdefault("pretrained", []).append(row)
            elif row["kind"] == "model":
                own = next(name for name in names if row["name"].startswith(f"input-{name}-"))
                for values in individual:
                    individual[values][own] = row[values][own]
            elif row["kind"] == "other":
                found.setdefault(_method_of(row["name"]), []).append(row)
            elif not row["error"]:
                found.setdefault(row["method"], []).append(row)
        found.setdefault("fine-tuned", []).append(individual)
    table = [
        {
            "name": key,
            "accuracy": {
                name: statistics.fmean(seed["accuracy"][name] for seed in seeds) for name in names
            },
            "mean": statistics.fmean(_mean(seed, names) for seed in seeds),
            "stderr": _error(seeds, names),
            "chosen": results["chosen"].get(key, {}),
        }
        for key, seeds in found.items()
    ]
    return sorted(table, key=_by_mean)


def _method_of(name: str) -> str:
    """Of a row that was merged elsewhere: its folder is called by the method and a hash."""
    return name.removeprefix("also-").rpartition("-")[0]


def _by_mean(line: Mapping[str, Any]) -> float:
    return float(line["mean"])


def _mean(seed: Mapping[str, Any], names: Sequence[str]) -> float:
    return statistics.fmean(seed["accuracy"][name] for name in names)


def _error(seeds: Sequence[Mapping[str, Any]], names: Sequence[str]) -> float:
    if len(seeds) > 1:
        return statistics.stdev([_mean(seed, names) for seed in seeds]) / len(seeds) ** 0.5
    return sum(seeds[0]["stderr"][name] ** 2 for name in names) ** 0.5 / len(names)


def write_results(results: Mapping[str, Any], caption: str, target: str, out: Path) -> None:
    """Write `results.json`, `table.md` and `methods.png` into a folder.

    Args:
        results: of `Suite.results`.
        caption: of the table.
        target: of make, that made them.
        out: the folder.
    """
    path = out / "results.json"
    older = json.loads(path.read_text()) if path.exists() else {"test": {}, "measured": []}
    measured = sittings(results, older)
    write_json(path, {**results, "caption": caption, "target": target, "measured": measured})
    write_report(out)


def sittings(results: Mapping[str, Any], older: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where the rows of `test` come from: `compare` finds those again that an older run made.

    Returns:
        Provenances with `cases`, a seed and a name each, as a record has them.
    """
    now, before = _rows(results), _rows(older)
    again = {key for key, row in now.items() if before.get(key) == row}
    kept = [
        one | {"cases": [key for key in one["cases"] if key in again]} for one in older["measured"]
    ]
    new = [key for key in now if key not in again]
    return [one for one in (*kept, provenance() | {"cases": new}) if one["cases"]]


def _rows(results: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{seed} {row['name']}": row for seed, rows in results["test"].items() for row in rows}


def write_report(out: Path) -> None:
    """Write `table.md` and `methods.png` from a folder's `results.json`."""
    results = json.loads((out / "results.json").read_text())
    table = lines(results)
    whole = next(line["mean"] for line in table if line["name"] == "fine-tuned")
    limits = ("pretrained", "fine-tuned")
    best = max((line for line in table if line["name"] not in limits), key=_by_mean)
    rows = [
        [
            f"**{line['name']}**" if line is best else line["name"],
            *(f"{100 * value:.1f}" for value in line["accuracy"].values()),
            f"{100 * line['mean']:.1f} ± {100 * line['stderr']:.1f}",
            f"{100 * line['mean'] / whole:.0f} %",
            ", ".join(f"{name} {value:g}" for name, value in line["chosen"].items()),
        ]
        for line in table
    ]
    header = ["method", *results["tasks"].values(), "mean", "of fine-tuned", "chosen"]
    ruler = ["---", *["---:"] * (len(header) - 2), "---"]
    caption = f"{results['caption']} {made_by(results['target'], results['measured'])}"
    (out / "table.md").write_text(f"{caption}\n\n{markdown_table(header, rows, ruler)}\n")
    _plot(table, out / "methods.png")


def _plot(table: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Means with their standard errors, as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 0.8 + 0.32 * len(table)), layout="constrained")
    axes = figure.subplots()
    colours = dict.fromkeys(("cart", "cart_auto"), "#d1632b")
    colours |= dict.fromkeys(("pretrained", "fine-tuned"), "#b0b7c3")
    bars = axes.barh(
        [line["name"] for line in table],
        [100 * line["mean"] for line in table],
        xerr=[100 * line["stderr"] for line in table],
        error_kw={"lw": 1},
        color=[colours.get(line["name"], "#2f6fb0") for line in table],
    )
    axes.bar_label(bars, fmt="%.1f", padding=4, fontsize=8)
    axes.margins(x=0.1)
    axes.set_xlabel("mean test accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
