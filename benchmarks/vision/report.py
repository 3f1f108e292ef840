"""The suite's table, from `results.json` (see `results`)."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.common.provenance import made_by
from benchmarks.common.tables import markdown_table
from benchmarks.vision.methods import MOST_POINTS


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
        "each task besides one model. Commands, grids and every seed are in `results.json`. "
        f"{made_by('bench-vision', result['measured'])}\n\n{table}\n"
        + (f"\nDid not run:\n{failed}\n" if failed else "")
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
