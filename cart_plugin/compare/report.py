"""The comparison's report: `report.json`, and from it alone `report.md` and `report.html`."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cart_plugin.checkpoints.files import write_json, write_text
from cart_plugin.compare.steps import Comparison, Row, title_of, versions

_REMARKS = {
    "error": "failed: {}",
    "warning": "{}",
    "note": "merged tensor by tensor (run its recipe by mergekit-cart merge): {}",
}
_KINDS = {"base": "base model", "model": "fine-tuned", "other": "as it is", "merged": ""}


def report(comparison: Comparison, rows: Sequence[Row], recipe: Path) -> dict[str, Any]:
    """Everything that the report says, as plain data."""
    return {
        "recipe": recipe.name,
        "evaluator": {key: value for key, value in comparison.request.items() if key != "sources"},
        "versions": versions(),
        "tasks": tasks(rows),
        "rows": [asdict(row) | {"model": _model(row), "mean": row.mean} for row in rows],
    }


def _model(row: Row) -> str | None:
    """The folder of the model, if it was kept."""
    if not Path(row.model).is_dir():
        return None
    return row.model if row.kind != "merged" else f"{row.name}/{Path(row.model).name}"


def tasks(rows: Sequence[Row]) -> list[str]:
    """The names of all metrics, in the evaluator's order."""
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def write_report(found: Mapping[str, Any], out: Path) -> None:
    """Write `report.json`, `report.md` and `report.html` into a folder."""
    write_json(out / "report.json", found)
    write_text(out / "report.md", markdown(found))
    write_text(out / "report.html", html(found))


def title(row: Mapping[str, Any]) -> str:
    """A row's name as a reader wants it."""
    return title_of(row["name"])


def settings(row: Mapping[str, Any]) -> str:
    """A row's settings in one line."""
    return ", ".join(f"{name} {_value(value)}" for name, value in row["settings"].items())


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')


def number(entry: Mapping[str, Any] | None) -> str:
    """A metric with its standard error."""
    if entry is None:
        return ""
    text = f"{entry['value']:.3f}"
    return text if entry["stderr"] is None else f"{text} ± {entry['stderr']:.3f}"


def markdown(found: Mapping[str, Any]) -> str:
    """The table as Markdown, failures below."""
    header = ["model", "mean", *found["tasks"], "settings", "merge s", "evaluate s"]
    lines = [
        _line(header),
        _line(["---", *["---:"] * (1 + len(found["tasks"])), "---", "---:", "---:"]),
    ]
    for row in found["rows"]:
        mean = "" if row["mean"] is None else f"{row['mean']:.3f}"
        cells = [
            f"[{title(row)}]({row['name']}/recipe.yaml)"
            if row["kind"] == "merged"
            else f"{title(row)} ({_KINDS[row['kind']]})"
        ]
        cells += ["failed" if row["error"] else mean]
        cells += [number(row["metrics"].get(task)) for task in found["tasks"]]
        cells += [settings(row), _seconds(row["merge_seconds"]), _seconds(row["evaluate_seconds"])]
        lines.append(_line(cells))
    text = [f"# {found['recipe']}: methods compared", "", *lines, ""]
    for said, rows in remarks(found).items():
        text.append(f"- {', '.join(title(row) for row in rows)}: {said}")
    text += ["", f"Metrics: {_metrics(found)}", f"Made with {_versions(found)}.", ""]
    return "\n".join(text)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def remarks(found: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """What there is to say beside the figures, and of which rows: often it is the same of all."""
    said: dict[str, list[Mapping[str, Any]]] = {}
    for row in found["rows"]:
        for kind, words in _REMARKS.items():
            if row[kind]:
                said.setdefault(words.format(row[kind]), []).append(row)
    return said


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _metrics(found: Mapping[str, Any]) -> str:
    names = {
        task: entry["metric"]
        + ("" if entry["higher_is_better"] else " (lower is better, not in the mean)")
        for row in found["rows"]
        for task, entry in row["metrics"].items()
    }
    return ", ".join(f"{task} {metric}".rstrip() for task, metric in names.items()) + "."


def _versions(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found["versions"].items())


def html(found: Mapping[str, Any]) -> str:
    """One self-contained page: a sortable table and the plots, nothing from the network."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("cart_plugin.compare", "."),
        autoescape=select_autoescape(default=True, default_for_string=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    return template.render(
        found=found,
        title=title,
        settings=settings,
        number=number,
        kinds=_KINDS,
        remarks=remarks(found),
        metrics=_metrics(found),
        versions=_versions(found),
        plots=plots(found),
    )


def plots(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Means as bars, and all tasks as a heat map, as SVG."""
    from matplotlib import rc_context

    rows = [row for row in found["rows"] if row["mean"] is not None]
    if not rows:
        return []
    # One scale of colours for all: what is better when lower has no place in it.
    lower = {
        name
        for row in rows
        for name, entry in row["metrics"].items()
        if not entry["higher_is_better"]
    }
    names = [name for name in found["tasks"] if name not in lower]
    with rc_context({"svg.hashsalt": "cart-plugin", "text.parse_math": False}):
        drawn = [{"title": "Mean over the tasks", "svg": _bars(rows)}]
        if len(names) > 1:
            drawn.append({"title": "By task", "svg": _heat(rows, names)})
    return drawn


def _bars(rows: Sequence[Mapping[str, Any]]) -> str:
    from matplotlib.figure import Figure

    ordered = sorted(rows, key=lambda row: row["mean"])
    figure = Figure(figsize=(6.4, 0.6 + 0.3 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    colours = {"base": "#b0b7c3", "model": "#8fa3bf", "other": "#5f9ea0", "merged": "#2f6fb0"}
    bars = axes.barh(
        range(len(ordered)),
        [row["mean"] for row in ordered],
        color=[
            "#d1632b" if row["method"].startswith("cart") else colours[row["kind"]]
            for row in ordered
        ],
    )
    axes.set_yticks(range(len(ordered)), [_short(title(row)) for row in ordered])
    axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def _heat(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    from matplotlib.figure import Figure

    values = [
        [
            row["metrics"][name]["value"] if name in row["metrics"] else float("nan")
            for name in names
        ]
        for row in rows
    ]
    left, below = (
        0.09 * max(len(_short(text)) for text in texts)  # inches that the labels take
        for texts in ([title(row) for row in rows], names)
    )
    size = (0.3 + left + 0.62 * len(names), 0.3 + 0.7 * below + 0.3 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    known = [value for line in values for value in line if math.isfinite(value)]
    low, top = min([0.0, *known]), max([0.0, *known])  # of log-likelihoods all are below zero
    axes.imshow(values, aspect="auto", cmap="Blues", vmin=low, vmax=top)
    axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), [_short(title(row)) for row in rows])
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            colour = "white" if value - low > 0.6 * (top - low) else "black"
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    return _svg(figure)


def _short(text: str, most: int = 32) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _svg(figure: Any) -> str:
    written = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # the same plot, the same bytes
    figure.savefig(written, format="svg", metadata=nothing, transparent=True)
    text = written.getvalue()
    return text[text.index("<svg") :]
