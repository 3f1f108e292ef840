"""The table and the plots of a comparison."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cart_plugin.cli.compare import _table
from cart_plugin.compare.report import html, plots
from cart_plugin.compare.steps import Row


def row(name: str, **values: float) -> dict[str, Any]:
    metrics = {task: {"value": value, "higher_is_better": True} for task, value in values.items()}
    mean = sum(values.values()) / len(values)
    return {"name": name, "kind": "merged", "method": name, "mean": mean, "metrics": metrics}


@pytest.mark.parametrize("scale", [1.0, -3.0, 0.0])
def test_values_may_be_of_any_sign(scale: float) -> None:
    """Accuracies, log-likelihoods, or nothing but zeros; and a task may lack in a row."""
    rows = [row("cart", a=0.5 * scale, b=0.7 * scale), row("linear", b=0.6 * scale)]
    drawn = plots({"rows": rows, "tasks": ["a", "b"]})
    assert [one["title"] for one in drawn] == ["Mean over the tasks", "By task"]
    assert all(f"{0.7 * scale:.2f}".lstrip("-") in one["svg"] for one in drawn[1:])


def test_rows_without_a_figure_are_sorted_as_none() -> None:
    """Any number in their place would be a rank: log-likelihoods lie below -1."""
    nothing: dict[str, Any] = {"metrics": {}, "mean": None}
    rows = [
        {**row("cart", a=-3.0), "merge_seconds": 1.5},
        {**row("linear", a=-2.5), "merge_seconds": None},
        {**row("ties", a=0.0), **nothing, "error": "boom", "merge_seconds": None},
    ]
    rest: dict[str, Any] = {
        "settings": {},
        "error": "",
        "note": "",
        "warning": "",
        "evaluate_seconds": None,
    }
    for one in rows:
        one["metrics"] = {
            name: {**entry, "stderr": None, "metric": ""} for name, entry in one["metrics"].items()
        }
    page = html(
        {
            "recipe": "r.yaml",
            "tasks": ["a"],
            "versions": {},
            "rows": [{**rest, **one} for one in rows],
        }
    )
    values = re.findall(r'data-value="([^"]*)"', page)
    assert values == ["-3.0", "-3.0", "1.5", "", "-2.5", "-2.5", "", "", "", "", "", ""]
    assert re.findall(r'class="best">([^<]*)', page) == ["-2.500"]


@pytest.mark.parametrize(("means", "best"), [((-3.0, -2.5, None), 1), ((None, None), None)])
def test_the_best_row_of_the_terminal_is_marked(means: Any, best: int | None) -> None:
    def metrics(mean: float | None) -> dict[str, Any]:
        return {} if mean is None else {"a": {"value": mean, "higher_is_better": True}}

    rows = [Row(f"m{n}", "merged", "", metrics=metrics(mean)) for n, mean in enumerate(means)]
    rows.append(Row("input", "model", "", metrics=metrics(-1.0)))
    table: Any = _table(rows)
    marked = [number for number, line in enumerate(table.rows) if line.style == "bold"]
    assert marked == ([] if best is None else [best])
