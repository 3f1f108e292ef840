"""The suite's results as plain data, from a finished run.

`results.json` holds `rows` (a method each, with its setting, its command and the accuracies of
every seed), `tuning` (every setting tried, with its validation mean), `failed`, `curves`, the
conditions and where the cases come from. Table and plots are made from it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.common.cache import read_manifest
from benchmarks.common.provenance import distinct
from benchmarks.vision.jobs import mean
from benchmarks.vision.methods import BY_TASKS, HEAT, INDIVIDUAL, METHODS
from benchmarks.vision.pool import ADAPTING_IMAGES
from benchmarks.vision.program import command
from benchmarks.vision.run import Run
from benchmarks.vision.tasks import TASKS, prepare_task


def results(run: Run) -> dict[str, Any]:
    """Everything that the run found, and how to repeat it."""
    plan = run.plan
    rows = [_row(run, *entry) for entry in run.entries()]
    failed = {
        METHODS[key].title: run.tried(key)[0][1]["error"]
        for key in plan.methods
        if run.chosen(key) is None
    }
    for row in rows:
        errors = [case["error"] for case in row["seeds"] if "error" in case]
        if errors:
            failed[row["title"]] = errors[0]
    return {
        "tasks": {name: TASKS[name].title for name in plan.tasks},
        "seeds": list(plan.seeds),
        "images": {"validation": plan.validation, "test": plan.test},
        "rows": rows,
        "tuning": {key: _tried(run, key) for key in plan.methods},
        "failed": failed,
        "sources": {name: _manifest(name) for name in plan.tasks},
        "adapting_images": ADAPTING_IMAGES,
        "workers": run.workers,
        "curves": _curves(run) if plan.curves else {},
        "conditions": run.record.conditions,
        "measured": distinct(run.record.measured),
    }


def _row(run: Run, key: str, method: Any, point: dict[str, Any]) -> dict[str, Any]:
    commands = [
        command([*method.overrides(point), *run.plan.pools("test", seed)])
        for seed in run.plan.seeds
    ]
    cases = [run.record.cases[line] for line in commands]
    means = [mean(case) for case in cases if "error" not in case]
    return {
        "key": key,
        "title": method.title,
        "setting": point,
        "tuned": len(method.points()) > 1,
        "data": method.data,
        "keeps": method.keeps,
        "commands": commands,
        "seeds": cases,
        "mean": _mean_of(means),
        "standard_error": _standard_error(means),
        "seconds": _mean_of([case["seconds"] for case in cases if "seconds" in case]),
    }


def _tried(run: Run, key: str) -> list[dict[str, Any]]:
    pools = run.plan.pools("validation")
    return [
        {
            "setting": point,
            "command": command([*METHODS[key].overrides(point), *pools]),
            **_found(case),
        }
        for point, case in run.tried(key)
    ]


def _found(case: dict[str, Any]) -> dict[str, Any]:
    if "error" in case:
        return {"error": case["error"]}
    return {"mean": mean(case), "accuracy": case["accuracy"]}


def _manifest(name: str) -> dict[str, Any]:
    """What a task's images were made from: packages with versions and hashes, and their number."""
    return read_manifest(prepare_task(name)) or {}


def _curves(run: Run) -> dict[str, Any]:
    validation = run.plan.pools("validation")
    heat = [
        {
            **point,
            "command": command([*HEAT.overrides(point), *validation]),
            **_found(case),
        }
        for point in HEAT.points()
        if "error" not in (case := run.case(HEAT, point, validation))
    ]
    by_tasks: dict[str, list[list[float]]] = {}
    for count in (*run.plan.counts, len(run.plan.tasks)):
        whole = count == len(run.plan.tasks)
        pools = run.plan.pools("test", count=None if whole else count)
        for key in ("individual", *BY_TASKS):
            method = METHODS.get(key, INDIVIDUAL)
            point: dict[str, Any] | None = {}
            if key in METHODS:
                point = run.chosen(key) if key in run.plan.methods else None
            if point is None:
                continue
            case = run.case(method, point, pools)
            if "error" not in case:
                by_tasks.setdefault(method.title, []).append([count, mean(case)])
    indexing = [
        {
            "rank_ratio": point["rank_ratio"],
            "share": case["storage"]["share"],
            "mean": mean(case),
            "command": command([*method.overrides(point), *pools]),
        }
        for method, point, pools in run.indexing()
        if "error" not in (case := run.case(method, point, pools))
    ]
    return {"rank_and_lambda": heat, "by_tasks": by_tasks, "indexing": indexing}


def _mean_of(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
