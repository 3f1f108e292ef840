"""The plots of a comparison."""

from __future__ import annotations

from typing import Any

import pytest

from cart_plugin.compare.report import plots


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
