"""The suite's results as plain data, and the table from them.

`results.json` holds `rows` (a method each, with its setting, its command and the accuracies of
every seed), `tuning` (every setting tried, with its validation mean), `failed`, `curves` and the
conditions. Everything else is made from it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common.cache import read_manifest
from benchmarks.common.tables import markdown_table
from benchmarks.vision.suite_jobs import mean
from benchmarks.vision.suite_methods import BY_TASKS, HEAT, INDIVIDUAL, METHODS, MOST_POINTS
from benchmarks.vision.suite_pool import ADAPTING_IMAGES
from benchmarks.vision.suite_program import command
from benchmarks.vision.tasks import TASKS, prepare_task

if TYPE_CHECKING:
    from benchmarks.vision.suite import Run


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


def by_task(row: dict[str, Any], task: str) -> float:
    """A row's accuracy on a task, over the seeds."""
    return statistics.fmean(case["accuracy"][task] for case in row["seeds"] if "accuracy" in case)


def limit(result: dict[str, Any]) -> float:
    """The individual models' mean accuracy.

    Raises:
        ValueError: they could not be evaluated; nothing can be compared with them.
    """
    row = next(row for row in result["rows"] if row["key"] == "individual")
    if row["mean"] is None:
        raise ValueError(f"the individual models failed: {row['seeds'][0].get('error')}")
    found: float = row["mean"]
    return found


def markdown(result: dict[str, Any]) -> str:
    """The table as Markdown, with what it needs to be read."""
    tasks, images = result["tasks"], result["images"]
    heading = ["method", *tasks.values(), "mean", "of individual", "merge s", "needs", "setting"]
    ruler = ["---", *["---:"] * (len(tasks) + 3), "---", "---"]
    lines = []
    best = max(
        (row for row in result["rows"] if not row["keeps"] and row["mean"] is not None),
        key=lambda row: row["mean"],
        default=None,
    )
    for row in result["rows"]:
        if row["mean"] is None:
            continue
        cells = _cells(row, tasks, limit(result))
        lines.append([f"**{cell}**" if row is best and cell else cell for cell in cells])
    table = markdown_table(heading, lines, ruler)
    seeds = len(result["seeds"])
    failed = "".join(f"\n- {title}: `{error}`" for title, error in result["failed"].items())
    spread = " (± its standard error)" if seeds > 1 else ""
    return (
        f"Test accuracy in per cent, {images['test']} images a task, mean of {seeds} fine-tuning "
        f"seed{'s' if seeds > 1 else ''}{spread}. Each setting was chosen on "
        f"{images['validation']} validation images a task of the first seed (evaluated in bf16), "
        f"from at most {MOST_POINTS}; `-` is a method without settings. `merge s` is on one core "
        "and includes loading the models. `needs` is data beyond the weights, or what is kept for "
        "each task besides one model. Made by `make bench-vision`; commands, grids and every seed "
        f"are in `results.json`.\n\n{table}\n" + (f"\nDid not run:\n{failed}\n" if failed else "")
    )


def _cells(row: dict[str, Any], tasks: dict[str, str], best: float) -> list[str]:
    error = row["standard_error"]
    spread = "" if error is None else f" ± {100 * error:.1f}"
    merged = row["key"] not in ("pretrained", "individual")
    setting = ", ".join(f"{name} {value:g}" for name, value in row["setting"].items())
    return [
        row["title"],
        *(f"{100 * by_task(row, task):.1f}" for task in tasks),
        f"{100 * row['mean']:.1f}{spread}",
        f"{100 * row['mean'] / best:.0f} %",
        f"{row['seconds']:.1f}" if merged and row["seconds"] is not None else "",
        row["data"] or _kept(row),
        (setting if row["tuned"] else "-") if merged else "",
    ]


def _kept(row: dict[str, Any]) -> str:
    """What a row keeps for each task, with its share of all models where the method says it."""
    shares = [case["storage"]["share"] for case in row["seeds"] if "storage" in case]
    share = f": {100 * statistics.fmean(shares):.0f} % of all models" if shares else ""
    return f"{row['keeps']}{share}"


def write_report(result: dict[str, Any], folder: Path) -> None:
    """Write `table.md` and the plots beside `results.json`."""
    from benchmarks.vision.suite_plots import save_plots

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(markdown(result))
    save_plots(result, folder)
