"""The solver benchmark's cases as tables and a plot, each bar of the project with its verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.common.provenance import made_by
from benchmarks.common.tables import markdown_table
from benchmarks.solvers.contestants import FULL

Case = dict[str, Any]

RATIO = 0.08  # of the bars
# How much faster than the full SVD each solver has to be.
SPEED_BARS: dict[str, dict[str, float]] = {
    "exact": {"768x768": 2.5, "768x3072": 5, "2048x2048": 3.5, "2048x8192": 9, "4096x4096": 3.5},
    "fast": {"768x768": 8, "768x3072": 12, "2048x2048": 10, "2048x8192": 16, "4096x4096": 10},
}
BAR_SHAPES = tuple(tuple(map(int, name.split("x"))) for name in SPEED_BARS["exact"])
ERROR_BARS = {"exact": 1e-5, "fast": 1e-3}
EXCESS_BARS = {"fast": 1e-4}
ESTIMATE_BAR = 10.0  # estimated / true error lies between a tenth and ten
ROUNDING = 4e-6  # errors below it are rounding, which nobody can estimate
ESTIMATING = ("exact", "fast", "auto")

STYLES = {  # colour, marker
    FULL: ("#3d4852", "*"),
    "exact": ("#1f6feb", "o"),
    "fast": ("#d9480f", "o"),
    "auto": ("#2b8a3e", "x"),
    "svd_lowrank, niter 2": ("#9aa5b1", "v"),
    "svd_lowrank, niter 4": ("#6b7785", "^"),
    "svds": ("#b197fc", "s"),
    "randomized_svd": ("#e0a800", "D"),
}


def shape_name(case: Case) -> str:
    """Such as ``768x3072``."""
    return "x".join(map(str, case["shape"]))


def speed_up(case: Case, solver: str) -> float:
    """How many times faster than the full SVD."""
    return case["solvers"][FULL]["seconds"] / case["solvers"][solver]["seconds"]


def trust(case: Case, solver: str) -> float | None:
    """Estimated over true error; None for solvers without an estimate."""
    figures = case["solvers"][solver]
    if figures["estimate"] is None:
        return None
    return figures["estimate"] / max(figures["error"], ROUNDING)


@dataclass(frozen=True)
class Bar:
    """One promise and what was measured, over all spectra of a shape.

    Attributes:
        solver: what is judged.
        shape: on which matrices, at `RATIO`.
        what: the quantity, with its limit.
        spectra: the figure of each spectrum, as text.
        missed: the spectra on which the promise does not hold.
    """

    solver: str
    shape: str
    what: str
    spectra: dict[str, str]
    missed: list[str]

    @property
    def verdict(self) -> str:
        """``met``, or where it is not."""
        if not self.missed:
            return "met"
        if len(self.missed) == len(self.spectra):
            return "missed"
        return f"missed: {', '.join(self.missed)}"


@dataclass(frozen=True)
class _Promise:
    """A quantity of a case, as text in a format, and the range in which it has to lie."""

    what: str
    figure: Callable[[Case, str], float]
    form: str
    low: float = -math.inf
    high: float = math.inf

    def judge(self, solver: str, shape: str, group: Sequence[Case]) -> Bar:
        values = {case["spectrum"]: self.figure(case, solver) for case in group}
        missed = [name for name, value in values.items() if not self.low <= value <= self.high]
        texts = {spectrum: self.form.format(value) for spectrum, value in values.items()}
        return Bar(solver, shape, self.what, texts, missed)


def _promises(solver: str, least: float) -> list[_Promise]:
    error = ERROR_BARS[solver]
    promises = [
        _Promise(f"speed-up ≥ {least:g}", speed_up, "{:.1f}", low=least),
        _Promise(f"error ≤ {error:g}", _figure("error"), "{:.0e}", high=error),
    ]
    if solver in EXCESS_BARS:
        excess = EXCESS_BARS[solver]
        promises.append(_Promise(f"excess ≤ {excess:g}", _figure("excess"), "{:.0e}", high=excess))
        promises.append(
            _Promise(
                "estimate / error, 0.1 to 10",
                lambda case, solver: trust(case, solver) or 0.0,
                "{:.2g}",
                1 / ESTIMATE_BAR,
                ESTIMATE_BAR,
            )
        )
    return promises


def _figure(name: str) -> Callable[[Case, str], float]:
    return lambda case, solver: float(case["solvers"][solver][name])


def bars(cases: Iterable[Case]) -> list[Bar]:
    """All bars on the shapes that were measured, with a full SVD beside them."""
    at_ratio = [case for case in cases if case["ratio"] == RATIO and FULL in case["solvers"]]
    found = []
    for solver, speeds in SPEED_BARS.items():
        having = [case for case in at_ratio if solver in case["solvers"]]
        for shape, least in speeds.items():
            group = [case for case in having if shape_name(case) == shape]
            if group:
                found += [p.judge(solver, shape, group) for p in _promises(solver, least)]
    return found


def _bar_rows(cases: Sequence[Case]) -> tuple[list[str], list[list[str]]]:
    found = bars(cases)
    spectra = list(dict.fromkeys(spectrum for bar in found for spectrum in bar.spectra))
    rows = [
        [bar.solver, bar.shape, bar.what]
        + [bar.spectra.get(spectrum, "") for spectrum in spectra]
        + [bar.verdict]
        for bar in found
    ]
    return ["solver", "shape", "bar", *spectra, "verdict"], rows


def _overview_rows(cases: Sequence[Case], ratio: float) -> tuple[list[str], list[list[str]]]:
    """A row a shape, a cell a solver: time of the median spectrum, speed-up, worst error."""
    names = [name for name in STYLES if any(name in case["solvers"] for case in cases)]
    shapes = list(dict.fromkeys(shape_name(case) for case in _by_size(cases)))
    rows = []
    for shape in shapes:
        group = [case for case in cases if shape_name(case) == shape and case["ratio"] == ratio]
        cells = [_cell(group, name) for name in names]
        if any(cells):
            rows.append([shape, *cells])
    return ["shape", *names], rows


def _cell(group: Sequence[Case], name: str) -> str:
    having = [case for case in group if name in case["solvers"]]
    if not having:
        return "–" if group else ""
    seconds = statistics.median(case["solvers"][name]["seconds"] for case in having)
    worst = max(case["solvers"][name]["error"] for case in having)
    speeds = [speed_up(case, name) for case in having if FULL in case["solvers"]]
    ratio = f" ({_short(statistics.median(speeds))}x)" if speeds and name != FULL else ""
    return f"{_seconds(seconds)}{ratio} {worst:.0e}"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.{1 if value < 0.01 else 0}f} ms" if value < 1 else f"{value:.2f} s"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _by_size(cases: Iterable[Case]) -> list[Case]:
    return sorted(cases, key=lambda case: (case["shape"][0] * case["shape"][1], case["shape"]))


def _ratios(cases: Sequence[Case]) -> list[float]:
    return sorted({case["ratio"] for case in cases})


def _overview_title(ratio: float) -> str:
    return f"Rank ratio {ratio:g}: median time, speed-up over the full SVD, worst error"


def console_tables(cases: Sequence[Case]) -> list[Table]:
    """The bars, and one overview a ratio, for a terminal."""
    tables = []
    content = [("Bars", *_bar_rows(cases))]
    content += [(_overview_title(ratio), *_overview_rows(cases, ratio)) for ratio in _ratios(cases)]
    for title, heading, rows in content:
        table = Table(title=title, title_justify="left")
        for name in heading:
            table.add_column(name)
        if heading[-1] != "verdict":
            rows = [[cell.replace(" (", "\n").replace(") ", "\n") for cell in row] for row in rows]
        for row in rows:
            missed = row[-1].startswith("missed") if heading[-1] == "verdict" else False
            table.add_row(*row, style="red" if missed else None)
        if rows:
            tables.append(table)
    return tables


def markdown(
    conditions: dict[str, Any],
    measured: Sequence[dict[str, Any]],
    cases: Sequence[Case],
    ratios: Sequence[float] | None = None,
) -> str:
    """The same as Markdown, with what a reader needs to place the figures.

    Args:
        conditions: what the figures were measured under.
        measured: where they come from.
        cases: the figures.
        ratios: rank ratios to give an overview of; None means all.
    """
    versions = ", ".join(f"{name} {number}" for name, number in conditions["versions"].items())
    machine = conditions["machine"]
    omitted = sum(len(case["omitted"]) for case in cases)
    where = f"on {machine['processor']}, {conditions['threads']} threads"
    gpu = conditions.get("gpu")
    target = "bench-solvers" if gpu is None else "bench-gpu"
    parts = [
        f"{made_by(target, measured, where if gpu is None else f'on {gpu}')} With {versions}. "
        "Errors are relative (Frobenius) to the best approximation of the rank, computed in fp64; "
        "excess is residual energy beyond the optimum's, relative to it. "
        f"Left out as too slow: {omitted} of "
        f"{omitted + sum(len(case['solvers']) for case in cases)} "
        "(`omitted` in `results.json`; – below).",
        f"### Bars, at rank ratio {RATIO:g}",
        markdown_table(*_bar_rows(cases)),
    ]
    for ratio in _ratios(cases) if ratios is None else ratios:
        parts += [f"### {_overview_title(ratio)}", markdown_table(*_overview_rows(cases, ratio))]
    return "\n\n".join(parts) + "\n"


def save_plot(cases: Sequence[Case], path: Path) -> None:
    """Time against error, a panel a spectrum: bars' ratio in full colour, other ratios pale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    spectra = list(dict.fromkeys(case["spectrum"] for case in cases))
    columns = min(3, len(spectra) + 1)
    lines = -(-(len(spectra) + 1) // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(4.4 * columns, 3.9 * lines),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    panels = list(grid.flat)
    names = [name for name in STYLES if any(name in case["solvers"] for case in cases)]
    largest = max(case["shape"][0] * case["shape"][1] for case in cases)
    for axes, spectrum in zip(panels, spectra, strict=False):
        for case in _by_size(cases):
            if case["spectrum"] != spectrum:
                continue
            size = 12 + 78 * (case["shape"][0] * case["shape"][1] / largest) ** 0.5
            for name in names:
                if name not in case["solvers"]:
                    continue
                color, marker = STYLES[name]
                axes.scatter(
                    1 / speed_up(case, name),
                    max(case["solvers"][name]["error"], 1e-8),
                    s=size,
                    marker=marker,
                    color=color,
                    alpha=0.9 if case["ratio"] == RATIO else 0.22,
                    lw=1.4 if marker == "x" else 0,
                    zorder=3 if name in ESTIMATING else 2,
                )
        axes.set(xscale="log", yscale="log", title=spectrum)
        axes.axhline(ERROR_BARS["fast"], color="#d9480f", lw=0.8, ls=":")
        axes.axhline(ERROR_BARS["exact"], color="#1f6feb", lw=0.8, ls=":")
        axes.grid(color="#e3e7eb", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelbottom=True)
    for axes in panels[len(spectra) :]:
        axes.axis("off")
    handles = [
        Line2D([], [], color=STYLES[name][0], marker=STYLES[name][1], ls="", label=name)
        for name in names
    ]
    note = f"Strong: rank ratio {RATIO:g}; pale: the others.\nLarger marks are larger matrices.\n"
    note += "Dotted: the error bars of exact and fast."
    panels[len(spectra)].legend(
        handles=handles, loc="center", frameon=False, title=note, alignment="left"
    )
    figure.supxlabel("time, as a share of the full SVD's")
    figure.supylabel("relative error of the truncated matrix")
    figure.savefig(path, dpi=130)
    plt.close(figure)
