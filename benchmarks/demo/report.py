"""The demo's results as a table on the terminal, as Markdown and as a plot, from one dictionary.

The dictionary (also the JSON file) holds `tasks` (name -> title), `rows` (one a method: accuracies
on test images, their mean, its share of the fine-tuned models' mean), where and when they come from
(`measured`), `two` (rows of the first two models merged alone) and what is needed to rerun.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.common.colors import CART_COLOR, LIMIT_COLOR, MERGED_COLOR
from benchmarks.common.provenance import made_by
from benchmarks.common.tables import markdown_table

NEXT = """\
Next: your own models, two or more, and their base. Write my.yaml (more in configs/mergekit):

  merge_method: cart_auto
  base_model: path/to/base
  models:
    - model: path/to/first
    - model: path/to/second
  dtype: bfloat16

  mergekit-cart doctor my.yaml     before: will it run, what does it need?
  mergekit-yaml my.yaml merged     merge
  mergekit-cart compare my.yaml --tasks arc_easy --out comparison
                                   the recipe by every method, judged by lm-eval

The commands are in .venv/bin."""


def columns(result: dict[str, Any]) -> list[str]:
    """The table's headings."""
    return [
        "method",
        *result["tasks"].values(),
        "mean",
        "of fine-tuned",
        "setting",
    ]


def cells(result: dict[str, Any]) -> list[list[str]]:
    """The table's rows as text; accuracies in per cent."""
    lines = []
    for row in result["rows"]:
        accuracies = [f"{100 * row['test'][name]:.1f}" for name in result["tasks"]]
        lines.append(
            [
                row["method"],
                *accuracies,
                f"{100 * row['mean']:.1f}",
                f"{100 * row['share']:.0f} %",
                row["setting"],
            ]
        )
    return lines


def print_table(result: dict[str, Any], console: Console) -> None:
    """Print the table; the best merged model is bold. A narrow terminal gets the settings below."""
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has room
    console.print("\nTest accuracy in per cent (fine-tuned: one model a task; below: one for all)")
    table = _console_table(result, settings=True)
    if (
        console.measure(table, options=console.options.update(max_width=1000)).maximum
        <= console.width
    ):
        console.print(table)
    else:
        console.print(_console_table(result, settings=False))
        for line in cells(result):
            if line[-1]:
                console.print(f"{line[0]}: {line[-1]}", highlight=False)
    console.print(two_models(result), highlight=False)


def two_models(result: dict[str, Any]) -> str:
    """A line on the first two models merged alone."""
    means = {row["method"]: f"{100 * row['mean']:.1f}" for row in result["two"]}
    titles = " and ".join(list(result["tasks"].values())[:2])
    others = ", ".join(f"{method} {mean}" for method, mean in means.items())
    return f"Two models alone ({titles}), mean of both: {others}"


def _console_table(result: dict[str, Any], *, settings: bool) -> Table:
    headings = ["method", *result["tasks"].values(), "mean", "share", "setting"]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for position, heading in enumerate(headings if settings else headings[:-1]):
        text = position == 0 or heading == "setting"
        table.add_column(heading, justify="left" if text else "right", no_wrap=True)
    best = best_merged(result)
    for row, line in zip(result["rows"], cells(result), strict=True):
        table.add_row(*line[: len(table.columns)], style="bold" if row is best else None)
        if row["method"] == "fine-tuned":
            table.add_section()
    return table


def best_merged(result: dict[str, Any]) -> dict[str, Any]:
    """The merged row with the highest mean."""
    return max((row for row in result["rows"] if row["merged"]), key=lambda row: row["mean"])


def markdown(result: dict[str, Any]) -> str:
    """The table as Markdown, with a line that says how it was made."""
    heading = columns(result)
    ruler = ["---" if name in ("method", "setting") else "---:" for name in heading]
    best = best_merged(result)
    lines = [
        [f"**{cell}**" if row is best and cell else cell for cell in line]
        for row, line in zip(result["rows"], cells(result), strict=True)
    ]
    counts = result["counts"]
    return (
        f"Test accuracy in per cent, {counts['test']} images a task. `fine-tuned` is one model a "
        f"task; every other row is one model for all {len(result['tasks'])} tasks. Each method's "
        f"setting was picked from those in `results.json` on {counts['validation']} validation "
        f"images a task. {made_by('demo', result['measured'])}\n\n"
        f"{markdown_table(heading, lines, ruler)}\n\n"
        f"{two_models(result)}.\n"
    )


def print_end(console: Console, out: Path, seconds: Mapping[str, float], whole: float) -> None:
    """Print where the results are, each stage's time, and what to try next.

    Args:
        console: where to.
        out: the results' folder.
        seconds: of each stage, by title.
        whole: seconds from start to end.
    """
    lines = [f"Plot: {out / 'accuracy.png'}, numbers: {out / 'results.json'}", "", "Time"]
    lines += [f"  {value:5.0f} s  {title}" for title, value in seconds.items()]
    lines += [f"  {whole:5.0f} s  in all", "", NEXT]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def save_plot(result: dict[str, Any], path: Path) -> None:
    """Bars of the mean accuracy, a dot a task, and the fine-tuned models' mean as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = {row["method"]: row for row in result["rows"]}
    limit = rows.pop("fine-tuned")
    shown = list(rows.values())
    figure, axes = plt.subplots(figsize=(8, 0.55 * len(shown) + 1.6), layout="constrained")
    for position, row in enumerate(shown):
        color = CART_COLOR if row["method"].startswith("cart") else MERGED_COLOR
        axes.barh(position, 100 * row["mean"], color=color, height=0.62, zorder=2)
        axes.text(
            1,
            position,
            f"{100 * row['mean']:.1f}",
            va="center",
            color="white",
            weight="bold",
            zorder=4,
        )
    for (name, title), marker in zip(result["tasks"].items(), "osD^vP*X", strict=False):
        values = [100 * row["test"][name] for row in shown]
        axes.scatter(
            values,
            range(len(shown)),
            s=26,
            marker=marker,
            label=title,
            zorder=3,
            ec="white",
            lw=0.6,
        )
    axes.axvline(100 * limit["mean"], color=LIMIT_COLOR, ls="--", lw=1.2, zorder=1)
    axes.text(
        100 * limit["mean"] - 0.8,
        -0.62,
        "one fine-tuned model a task",
        color=LIMIT_COLOR,
        ha="right",
        fontsize=9,
    )
    axes.set_yticks(range(len(shown)), [row["method"] for row in shown])
    axes.set_ylim(len(shown) - 0.5, -0.9)
    axes.set_xlim(0, 100)
    axes.set_xlabel("test accuracy in per cent: mean (bar) and each task (dots)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e3e7eb", zorder=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
