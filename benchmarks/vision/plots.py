"""The suite's plots, from `results.json`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.common.colors import CART_COLOR, LIMIT_COLOR, MERGED_COLOR
from benchmarks.vision.report import by_task, limit

DATA_COLOR = "#d9a441"
RADAR = (
    *("individual", "cart", "cart_adamerging", "tsvm", "wudi", "task_arithmetic", "average"),
    "cart_auto",
)
COLORS = (
    *("#3d4852", "#1f6feb", "#8250df", "#2da44e", "#d9a441", "#cf5f5f", "#9aa5b1"),
    "#bf3989",
)


def save_plots(result: dict[str, Any], folder: Path) -> None:
    """Write every plot that the results have figures for."""
    import matplotlib

    matplotlib.use("Agg")
    plots = {"methods": methods, "radar": radar}
    curves = result["curves"]
    if curves:
        plots |= {
            "rank_and_lambda": rank_and_lambda,
            "number_of_tasks": number_of_tasks,
            "indexing": indexing,
        }
    for name, draw in plots.items():
        _save(draw(result), folder / f"{name}.png")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=150, bbox_inches="tight")  # a radar's labels reach over its axes
    plt.close(figure)


def _figure(width: float, height: float, **options: Any) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        figsize=(width, height), layout="constrained", subplot_kw=options or None
    )
    return figure, axes


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e7eb", zorder=0)


def methods(result: dict[str, Any]) -> Any:
    """Mean accuracy of each method as a bar, with its standard error over the seeds."""
    rows = [row for row in result["rows"] if row["mean"] is not None and row["key"] != "individual"]
    rows.sort(key=lambda row: row["mean"])
    figure, axes = _figure(8, 0.34 * len(rows) + 1.4)
    for position, row in enumerate(rows):
        ours = row["key"].startswith("cart")
        color = CART_COLOR if ours else DATA_COLOR if row["data"] else MERGED_COLOR
        note = " *" if row["keeps"] else ""
        error = 100 * (row["standard_error"] or 0)
        axes.barh(
            position, 100 * row["mean"], xerr=error, color=color, height=0.66, zorder=2, capsize=2
        )
        axes.text(
            1, position, f"{100 * row['mean']:.1f}{note}", va="center", color="white", zorder=4
        )
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.axvline(100 * limit(result), color=LIMIT_COLOR, ls="--", lw=1.2, zorder=1)
    axes.text(100 * limit(result) - 0.8, -1.1, "individual", color=LIMIT_COLOR, ha="right")
    axes.set_xlim(0, 100)
    axes.set_xlabel(
        "mean test accuracy in per cent (blue: this plugin, yellow: needs data, *: keeps more than "
        "one model)",
        fontsize=9,
    )
    _tidy(axes)
    axes.grid(visible=False, axis="y")
    return figure


def radar(result: dict[str, Any]) -> Any:
    """Accuracy by task as a share of the individual model's, as in the paper."""
    rows = {row["key"]: row for row in result["rows"] if row["mean"] is not None}
    tasks = result["tasks"]
    angles = [2 * math.pi * position / len(tasks) for position in range(len(tasks))]
    figure, axes = _figure(7.5, 6, projection="polar")
    for key, color in zip(RADAR, COLORS, strict=True):
        if key not in rows:
            continue
        shares = [
            100 * by_task(rows[key], task) / max(by_task(rows["individual"], task), 1e-9)
            for task in tasks
        ]
        axes.plot([*angles, angles[0]], [*shares, shares[0]], color=color, label=rows[key]["title"])
        if key == "cart":
            axes.fill([*angles, angles[0]], [*shares, shares[0]], color=color, alpha=0.12)
    axes.set_xticks(angles, list(tasks.values()))
    axes.set_ylim(0, 105)
    axes.set_title("per cent of the individual model's accuracy", fontsize=10)
    axes.legend(loc="center left", bbox_to_anchor=(1.1, 0.5), frameon=False)
    return figure


def rank_and_lambda(result: dict[str, Any]) -> Any:
    """CART's validation accuracy over rank and lambda."""
    cells = result["curves"]["rank_and_lambda"]
    ratios = sorted({cell["rank_ratio"] for cell in cells})
    scales = sorted({cell["scaling_factor"] for cell in cells})
    grid = [[math.nan] * len(scales) for _ in ratios]
    for cell in cells:
        row, column = ratios.index(cell["rank_ratio"]), scales.index(cell["scaling_factor"])
        grid[row][column] = 100 * cell["mean"]
    figure, axes = _figure(7, 4.5)
    drawn = axes.imshow(grid, origin="lower", aspect="auto", cmap="viridis")
    middle = sum(drawn.get_clim()) / 2
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            color = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
    axes.set_yticks(range(len(ratios)), [f"{100 * ratio:g} %" for ratio in ratios])
    axes.set_xlabel("lambda")
    axes.set_ylabel("rank, of the full one")
    axes.set_title("CART: mean validation accuracy in per cent", fontsize=10)
    figure.colorbar(drawn)
    return figure


def number_of_tasks(result: dict[str, Any]) -> Any:
    """Mean test accuracy over the number of merged tasks."""
    figure, axes = _figure(7, 4.2)
    colors = iter(color for color in COLORS if color not in (CART_COLOR, LIMIT_COLOR))
    for title, points in result["curves"]["by_tasks"].items():
        style = {"ls": "--"} if title == "individual" else {"marker": "o", "ms": 4}
        own = {"individual": LIMIT_COLOR, "CART": CART_COLOR}
        color = own.get(title) or next(colors)
        counts, means = zip(*points, strict=True)
        axes.plot(counts, [100 * value for value in means], label=title, color=color, **style)
    axes.set_xlabel("tasks, in one order (one seed; settings as chosen for all of them)")
    axes.set_ylabel("mean test accuracy in per cent")
    axes.set_ylim(0, 100)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _tidy(axes)
    return figure


def indexing(result: dict[str, Any]) -> Any:
    """CART-Indexing's mean test accuracy over the storage that it needs."""
    points = result["curves"]["indexing"]
    figure, axes = _figure(6.5, 4)
    shares = [100 * point["share"] for point in points]
    means = [100 * point["mean"] for point in points]
    axes.plot(shares, means, marker="o", color=CART_COLOR)
    for point, share, accuracy in zip(points, shares, means, strict=True):
        axes.annotate(
            f"{100 * point['rank_ratio']:g} %",
            (share, accuracy),
            xytext=(4, -12),
            textcoords="offset points",
            fontsize=8,
        )
    first_seed = next(row for row in result["rows"] if row["key"] == "individual")["seeds"][0]
    top = 100 * sum(first_seed["accuracy"].values()) / len(first_seed["accuracy"])
    axes.axhline(top, color=LIMIT_COLOR, ls="--", lw=1.2)
    axes.text(shares[-1], top, "individual", color=LIMIT_COLOR, ha="right", va="bottom")
    axes.set_xlabel("storage, in per cent of all models' (labels: rank)")
    axes.set_ylabel("mean test accuracy in per cent")
    _tidy(axes)
    return figure
