"""The table and the plot of `benchmarks.compression`, from its records."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.colors import CART_COLOR, LIMIT_COLOR, MERGED_COLOR
from benchmarks.common.provenance import made_by
from benchmarks.common.tables import markdown_table

INDIVIDUAL = "fine-tuned"
_TITLES = {"vision": "eight image tasks, DINOv2 ViT-S", "text": "eight text tasks, MiniLM"}

# The beginning of a case's name, what a plot calls the curve, and how it looks.
_CURVES = {
    "compress, rank": ("compress --rank", CART_COLOR, "o"),
    "compress, target size": ("compress --target-size", "#54aeff", "s"),
    "compress, bf16, target size": ("the same, --dtype bfloat16", "#bf3989", "D"),
    "around the pretrained, rank": ("compress --base pretrained", "#d9a441", "v"),
    "extract-lora, rank": ("mergekit-extract-lora", "#8250df", "x"),
}
_NOT_IN_CURVES = ("exact", "matrices only")
_POINTS = {  # and where the label stands, in points from the mark
    "8-bit rounding": ("8 bits", (-8, 7)),
    "4-bit rounding": ("4 bits", (-8, 7)),
    "EMR": ("EMR", (6, -10)),
    "TALL masks": ("TALL masks", (6, -3)),
    "extract-lora, rank 23, matrices only": ("mergekit-extract-lora,\nmatrices only", (7, -22)),
}

# Rows of the table, by the beginning of the case's name.
_ORDER = (
    *("fine-tuned", "average", "compress, rank", "compress, target size of"),
    *("compress, target", "compress, bf16", "around", "extract-lora", "8-bit", "4-bit"),
)

Cases = Mapping[str, Mapping[str, Any]]


def write_report(folder: Path, suites: Sequence[str], seeds: Sequence[int]) -> str:
    """Write `table.md` and `accuracy_bytes.png`; returns the table."""
    from matplotlib import pyplot as plt

    records = {
        suite: [json.loads((folder / f"{suite}-{seed}.json").read_text()) for seed in seeds]
        for suite in suites
    }
    known = {suite: [one["cases"] for one in of_suite] for suite, of_suite in records.items()}
    measured = [one for of_suite in records.values() for own in of_suite for one in own["measured"]]
    text = markdown(known, len(seeds), made_by("bench-compress", measured))
    (folder / "table.md").write_text(text)
    figure = plot({suite: records[0] for suite, records in known.items()})
    figure.savefig(folder / "accuracy_bytes.png", dpi=150)
    plt.close(figure)
    return text


def markdown(known: Mapping[str, Sequence[Cases]], seeds: int, made: str) -> str:
    """One row a way of storing that all seeds have; both suites side by side.

    Args:
        known: cases by suite and seed.
        seeds: how many.
        made: the caption's last sentence.
    """
    rows = []
    for name in sorted(next(iter(known.values()))[-1], key=_place):
        cells: list[str] = []
        for records in known.values():
            cells += _cells(name, records)
        rows.append([name, *cells])
    heading = ["stored as"]
    for suite in known:
        heading += [f"{suite}: size", "accuracy", "of fine-tuned", "error"]
    table = markdown_table(heading, rows, ["---", *["---:"] * (len(heading) - 1)])
    peft = max(max(records[0]["peft"].values()) for records in known.values())
    return (
        "Test accuracy in per cent of each task's own encoder after storing all eight (500 "
        f"examples a task), mean of {seeds} fine-tuning seeds ± standard error; their size as a "
        "share of eight fp32 models; the squared error of all weights, relative to that of the "
        "average. Rank 23 is 6 % of the short sides. `compress` leaves tensors other than "
        "matrices as the base has them (`--small-error 0.1`), and so does `extract-lora` where it "
        "says so; by their defaults both store them whole. Outputs of PEFT with the third row's "
        f"adapters, switched or merged, differ from those of `expand` by {peft:.0e} at most. "
        f"{made}\n\n{table}\n"
    )


def _place(name: str) -> int:
    fitting = (place for place, start in enumerate(_ORDER) if name.startswith(start))
    return next(fitting, len(_ORDER))


def _cells(name: str, records: Sequence[Cases]) -> list[str]:
    if any("error" in record[name] for record in records):
        return ["does not run", "", "", ""]
    means = [_mean(record[name]) for record in records]
    whole = [_mean(record[INDIVIDUAL]) for record in records]
    lost = [
        record[name]["squared_error"] / record["average"]["squared_error"] for record in records
    ]
    spread = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0
    share = statistics.fmean(record[name]["share"] for record in records)
    kept = statistics.fmean(means) / statistics.fmean(whole)
    return [
        f"{100 * share:.1f} %",
        f"{100 * statistics.fmean(means):.1f} ± {100 * spread:.1f}",
        f"{100 * kept:.1f} %",
        f"{100 * statistics.fmean(lost):.0f} %",
    ]


def _mean(case: Mapping[str, Any]) -> float:
    return statistics.fmean(case["accuracy"].values())


def plot(known: Mapping[str, Cases]) -> Any:
    """A panel a suite: share of the fine-tuned accuracy over share of the bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(known), figsize=(11, 4.6), layout="constrained")
    for axes, (suite, cases) in zip(panels, known.items(), strict=True):
        whole = _mean(cases[INDIVIDUAL])

        def point(name: str, cases: Cases = cases, whole: float = whole) -> tuple[float, float]:
            return 100 * cases[name]["share"], 100 * _mean(cases[name]) / whole

        for start, (title, color, marker) in _CURVES.items():
            names = [
                name
                for name, case in cases.items()
                if name.startswith(start)
                and not name.endswith(_NOT_IN_CURVES)
                and "error" not in case
            ]
            if names:
                across, up = zip(*sorted(point(name) for name in names), strict=True)
                axes.plot(across, up, color=color, marker=marker, ms=5, lw=1.4, label=title)
        for name, (title, beside) in _POINTS.items():
            if name not in cases or "error" in cases[name]:
                continue
            across_one, up_one = point(name)
            axes.scatter(across_one, up_one, color=MERGED_COLOR, s=40, zorder=3)
            axes.annotate(
                title, (across_one, up_one), beside, textcoords="offset points", fontsize=8
            )
        axes.axhline(100, color=LIMIT_COLOR, ls="--", lw=1)
        axes.axhline(99, color=LIMIT_COLOR, ls=":", lw=1)
        axes.set(title=_TITLES[suite], xlabel="size, % of eight fp32 models")
        axes.set_xlim(left=0)
        axes.set_ylim(5 * (axes.get_ylim()[0] // 5), 101.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3e7eb", zorder=0)
    panels[0].set_ylabel("accuracy, % of the fine-tuned models'")
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside upper center", ncols=5, fontsize=9)
    return figure
