"""The merge benchmark's runs as tables and a plot, each bar of the project with its verdict."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.common.provenance import made_by
from benchmarks.common.tables import markdown_table

Cases = dict[str, Any]

COLORS = dict.fromkeys(
    ("cart, auto", "cart, exact", "cart, fast", "cart_auto", "cart_auto, base"), "#1f6feb"
)
OTHER_COLOR, LINEAR_COLOR = "#9aa5b1", "#3d4852"
CURVES = {"models": "fine-tuned models", "hidden": "hidden size"}
FLOOR = "floor on Llama"  # `benchmarks.speed.floor`, with the number of cores
# Exponents that the growth may have; the time of a merge of tiny models is taken off first.
EXPONENT_BARS = {"models": 1.1, "hidden": 3.0}


def medians(case: dict[str, Any]) -> dict[str, float]:
    """Medians of wall and CPU seconds, and of the peak in MB."""
    runs = case["runs"]
    return {
        "wall": statistics.median(run["wall"] for run in runs),
        "cpu": statistics.median(run["cpu"] for run in runs),
        "peak": statistics.median(run["peak"] for run in runs) / 1e6,
    }


def series(cases: Cases, prefix: str) -> dict[str, dict[str, dict[str, float]]]:
    """Medians by series and label, of the series whose name starts so."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for case in cases.values():
        if "runs" in case and case["series"].startswith(prefix):
            found.setdefault(case["series"], {})[case["label"]] = medians(case)
    return found


def growth(cases: Cases) -> dict[str, tuple[list[int], list[float], float | None]]:
    """Sizes, wall seconds and fitted exponent of each growth curve.

    The exponent is that of the time beyond a merge of tiny models, fitted to all sizes, or None
    where that is no time at all.
    """
    found: dict[str, tuple[list[int], list[float], float | None]] = {}
    start = series(cases, "start").get("start", {}).get("tiny", {}).get("wall", 0.0)
    for name in CURVES:
        points = series(cases, name).get(name, {})
        sizes = sorted(map(int, points))
        walls = [points[str(size)]["wall"] for size in sizes]
        own = [wall - start for wall in walls]
        slope = None
        if len(sizes) > 1 and min(own) > 0.05:
            slope = statistics.linear_regression(
                [math.log(size) for size in sizes], [math.log(wall) for wall in own]
            ).slope
        if sizes:
            found[name] = sizes, walls, slope
    return found


def _method_rows(points: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    ties = points.get("ties", {}).get("wall")
    rows = [
        [
            label,
            f"{of['wall']:.1f}",
            f"{of['wall'] / ties:.2f}" if ties else "",
            f"{of['cpu']:.1f}",
            f"{of['peak']:.0f}",
        ]
        for label, of in sorted(points.items(), key=lambda item: item[1]["wall"])
    ]
    return ["method", "wall s", "of ties", "CPU s", "peak MB"], rows


def _growth_rows(cases: Cases) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, (sizes, walls, slope) in growth(cases).items():
        times = ", ".join(f"{n}: {wall:.1f} s" for n, wall in zip(sizes, walls, strict=True))
        rows.append([CURVES[name], times, "–" if slope is None else f"{slope:.2f}"])
    return ["grows with", "wall", "exponent beyond the start"], rows


def _accuracy_rows(cases: Cases) -> tuple[list[str], list[list[str]]]:
    rows = []
    for key, case in cases.items():
        if "relative_difference" in case:
            _, _, label = key.partition(" | ")
            where = key.partition(" | ")[0].removeprefix("accuracy on ")
            rows.append(
                [where, label, f"{case['relative_difference']:.1e}", f"{case['worst_tensor']:.1e}"]
            )
    return ["models", "method", "difference to cart, exact", "worst tensor"], rows


def _bar_rows(cases: Cases) -> tuple[list[str], list[list[str]]]:
    rows = []
    lowest = _lowest(cases)
    # The bars speak of these models; the vision encoders are so small that starting decides.
    for points in series(cases, "methods on Llama").values():
        cart = points.get("cart, auto")
        if cart is None:
            continue
        for other, quantity, limit in (
            ("ties", "wall", 0.35),
            ("dare_ties", "wall", 0.8),
            ("plain full SVD", "wall", 0.2),
            ("ties", "peak", 1.0),
        ):
            if other in points:
                share = cart[quantity] / points[other][quantity]
                what = f"{quantity} at most {limit:g} times that of {other}"
                least = ""
                if lowest is not None and quantity == "wall":
                    least = f"{lowest / points[other]['wall']:.2f}"
                rows.append(["Llama", what, f"{share:.2f}", _verdict(share <= limit), least])
    for models, points in series(cases, "methods on").items():
        for label, quantity, limit in (
            ("cart_auto", "wall", 1.2),
            ("cart_auto", "peak", 1.5),
            ("cart_auto, base", "wall", 1.3),
            ("cart_auto, base", "peak", 1.2),
        ):
            if label in points and "cart, auto" in points:
                share = points[label][quantity] / points["cart, auto"][quantity]
                what = f"{label}: {quantity} at most {limit:g} times that of cart"
                where = models.removeprefix("methods on ")
                rows.append([where, what, f"{share:.2f}", _verdict(share <= limit), ""])
    for name, (_, _, slope) in growth(cases).items():
        if name in EXPONENT_BARS and slope is not None:
            limit = EXPONENT_BARS[name]
            what = f"grows with {CURVES[name]} to the power of at most {limit:g}"
            rows.append(["growth", what, f"{slope:.2f}", _verdict(slope <= limit), ""])
    return ["models", "bar for cart (auto)", "measured", "verdict", "at the floor"], rows


def _lowest(cases: Cases) -> float | None:
    """Seconds below which no merge by `cart` can get on the Llamas; None if that is not known.

    A process that merges next to nothing, all bytes read and written once, and the products of the
    decompositions shared by all cores.
    """
    parts = cases.get(FLOOR)
    start = series(cases, "start").get("start", {}).get("tiny")
    if parts is None or start is None:
        return None
    return start["wall"] + parts["reading"] + parts["writing"] + parts["products"] / parts["cores"]


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def _contents(
    conditions: dict[str, Any], cases: Cases
) -> list[tuple[str, tuple[list[str], list[list[str]]]]]:
    # Merges of tiny models say nothing about the bars.
    tables = [] if conditions["quick"] else [("Bars", _bar_rows(cases))]
    for name, points in series(cases, "methods on").items():
        tables.append((f"Whole merges, {name}", _method_rows(points)))
    tables.append(("Growth of cart (auto)", _growth_rows(cases)))
    tables.append(("Merged weights: what is added to the mean", _accuracy_rows(cases)))
    return [(title, content) for title, content in tables if content[1]]


def console_tables(conditions: dict[str, Any], cases: Cases) -> list[Table]:
    """All tables, for a terminal."""
    tables = []
    for title, (heading, rows) in _contents(conditions, cases):
        table = Table(title=title, title_justify="left")
        for name in heading:
            table.add_column(name, justify="right" if name[-2:] in (" s", "MB") else "left")
        for row in rows:
            table.add_row(*row, style="red" if "missed" in row else None)
        tables.append(table)
    return tables


def markdown(conditions: dict[str, Any], measured: list[dict[str, Any]], cases: Cases) -> str:
    """All tables as Markdown, with what a reader needs to place the figures."""
    machine, versions = conditions["machine"], conditions["versions"]
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    counts = sorted({len(case["runs"]) for case in cases.values() if "runs" in case})
    runs = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    where = f"on {machine['processor']}, {machine['cores']} cores"
    gpu = conditions.get("gpu")
    where += "" if gpu is None else f", with {gpu}"
    target = "bench-merge" if gpu is None else "bench-gpu"
    parts = [
        f"{made_by(target, measured, where)} With {listed}. "
        f"Each figure is the median of {runs} processes, from start to exit. "
        f"{_models(cases)}An exponent is fitted to the time beyond that of a merge of tiny models. "
        "The floor of a bar: starting, reading and writing all bytes once, and the products of "
        "the decompositions, each timed alone.",
    ]
    for title, (heading, rows) in _contents(conditions, cases):
        parts += [f"### {title}", markdown_table(heading, rows)]
    return "\n\n".join(parts) + "\n"


def _models(cases: Cases) -> str:
    compared = (case for case in cases.values() if case.get("series", "").startswith("methods on"))
    size = next((case["size"] for case in compared if "hidden" in case["size"]), None)
    if size is None:
        return ""
    return (
        f"The Llama models: {size['models']} of {size['hidden']} hidden, {size['layers']} layers, "
        "bf16. "
    )


def save_plot(cases: Cases, path: Path) -> None:
    """Bars of each method's wall time with a dot a run, and cart's growth on log scales."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods, curves = series(cases, "methods on"), growth(cases)
    count = len(methods) + bool(curves)
    if not count:
        return
    figure, grid = plt.subplots(
        1, count, figsize=(5.2 * count, 3.8), layout="constrained", squeeze=False
    )
    panels = list(grid.flat)
    for axes, (name, points) in zip(panels, methods.items(), strict=False):
        ordered = sorted(points.items(), key=lambda item: item[1]["wall"])
        for position, (label, of) in enumerate(ordered):
            color = COLORS.get(label, OTHER_COLOR)
            axes.barh(position, of["wall"], color=color, height=0.64, zorder=2)
            walls = [run["wall"] for run in cases[f"{name} | {label}"]["runs"]]
            axes.scatter(walls, [position] * len(walls), s=14, color=LINEAR_COLOR, zorder=3)
            axes.text(max(walls), position, f"  {of['wall']:.1f} s", va="center", fontsize=9)
        axes.set_yticks(range(len(ordered)), [label for label, _ in ordered])
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.set_xlim(left=0)
        axes.set(title=name.removeprefix("methods on "), xlabel="wall seconds of a whole merge")
        axes.grid(axis="x", color="#e3e7eb", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    if curves:
        axes = panels[-1]
        markers = zip("osD", ("#1f6feb", "#d9480f", "#2b8a3e"), strict=True)
        for (name, (sizes, walls, slope)), (marker, color) in zip(
            curves.items(), markers, strict=False
        ):
            label = CURVES[name] + ("" if slope is None else f": power {slope:.2f}")
            relative = [size / sizes[0] for size in sizes]
            axes.plot(relative, walls, marker=marker, color=color, label=label, zorder=3)
            axes.annotate(f"{sizes[-1]}", (relative[-1], walls[-1]), (6, -3), fontsize=9,
                          textcoords="offset points")  # fmt: skip
        axes.set(xscale="log", yscale="log", title="growth of cart (auto)")
        axes.set_xlabel("size, as a multiple of the smallest")
        axes.set_ylabel("wall seconds of a whole merge")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
        axes.tick_params(which="minor", labelsize=7)
        axes.legend(frameon=False)
        axes.grid(color="#e3e7eb", which="both", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
