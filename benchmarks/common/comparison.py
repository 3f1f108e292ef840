"""What the suites that go through `mergekit-cart compare` share: tuning and testing.

Each method chooses its settings on the validation split of the first fine-tuning seed, from a grid
of at most eight points; the chosen setting is judged once, on the test split of every seed. All
that is finished is found again by `compare`, so that a suite goes on where it stopped.
"""

from __future__ import annotations

import json
import os
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
        """What `tune` and `test` found, as `benchmarks.common.compared.write_results` takes it."""
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
