"""Tables and plots of `benchmarks.twenty`, from its records."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.auto.number import AUTO, FINE_TUNED
from benchmarks.common.colors import CART_COLOR, LIMIT_COLOR
from benchmarks.common.provenance import made_by
from benchmarks.common.tables import markdown_table, percent_cell
from benchmarks.twenty.suite import (
    AVERAGE,
    BASE,
    COUNTS,
    EXAMPLES,
    LAMBDAS,
    METHODS,
    SHARES,
    TUNED,
    TUNED_COUNTS,
    best,
    rank_key,
)
from benchmarks.vision.tasks import TASKS

PAPER = {8: (0.12, 2.0), 14: (0.16, 1.5), 20: (0.32, 1.9)}
"""Rank and lambda of CART as its authors ship them, CLIP ViT-B/32."""
RADAR = (FINE_TUNED, TUNED, AUTO, "TSV-M", "Iso-CTS", "average")
CENTRES = {AVERAGE: "centred at the average (CART)", BASE: "from the base"}


def read(folder: Path, kind: str, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """The records there are, a seed each."""
    paths = [folder / f"{kind}-{seed}.json" for seed in seeds]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def write_report(folder: Path, seeds: tuple[int, ...]) -> str:
    """Write `table.md` and the plots that the records have figures for; return the table."""
    from matplotlib import pyplot as plt

    found = read(folder, "ranks", seeds), read(folder, "number", seeds)
    text = markdown(*found)
    (folder / "table.md").write_text(text)
    drawn = {"ranks": (ranks, found[0]), "number": (number, found[1]), "radar": (radar, found[1])}
    for name, (draw, records) in drawn.items():
        if records:
            figure = draw(records)
            figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
            plt.close(figure)
    return text


def markdown(tuned: list[dict[str, Any]], tested: list[dict[str, Any]]) -> str:
    """Accuracy by number of tasks, and CART's best rank and lambda beside the paper's."""
    measured = [one for record in (*tuned, *tested) for one in record["measured"]]
    seeds = "1 fine-tuning seed" if len(tested) == 1 else f"{len(tested)} fine-tuning seeds"
    parts = [
        f"Test accuracy in per cent ({EXAMPLES['test']} images a task, {seeds}) of image encoders "
        "merged, by how many tasks they are, the first ones of one order. Tuned are CART's rank "
        "and lambda and the scale of task arithmetic, on the first seed's validation split, for "
        "8, 14 and 20 tasks; fewer take the next larger number's. Share: of the fine-tuned "
        f"models' accuracy, in per cent. {made_by('bench-twenty', measured)}"
    ]
    if tested:
        parts.append(_accuracies(tested))
    if tuned:
        parts.append(
            f"CART's rank and lambda with the best validation accuracy ({EXAMPLES['validation']} "
            "images a task), and the authors' for CLIP ViT-B/32; low-rank task vectors from the "
            "base beside it."
        )
        parts.append(_best_ranks(tuned[0]["cases"]))
    return "\n\n".join(parts) + "\n"


def _means(tested: list[dict[str, Any]], method: str, count: int) -> list[float]:
    return [
        statistics.fmean(record["cases"][method][str(count)].values())
        for record in tested
        if method in record["cases"]
    ]


def _accuracies(tested: list[dict[str, Any]]) -> str:
    whole = [method for method in METHODS if len(_means(tested, method, 2)) == len(tested)]
    merged = [method for method in whole if method != FINE_TUNED]
    leading = {
        count: max(merged, key=lambda one: statistics.fmean(_means(tested, one, count)))
        for count in COUNTS
    }
    rows = []
    for method in whole:
        cells = [
            percent_cell(_means(tested, method, count), bold=leading[count] == method)
            for count in COUNTS
        ]
        limit, own = (
            statistics.fmean(_means(tested, one, COUNTS[-1])) for one in (FINE_TUNED, method)
        )
        rows.append([method, *cells, f"{100 * own / limit:.0f}"])
    heading = ["", *(f"{count} tasks" for count in COUNTS), f"share at {COUNTS[-1]}"]
    return markdown_table(heading, rows, ["---", *["---:"] * (len(heading) - 1)])


def _best_ranks(cases: Mapping[str, Any]) -> str:
    rows = []
    for count in TUNED_COUNTS:
        cells = []
        for centre in (AVERAGE, BASE):
            share, scale, accuracy = best(cases, count, centre)
            cells += [f"{100 * share:g} %, {scale:g}", f"{100 * accuracy:.1f}"]
        share, scale = PAPER[count]
        rows.append([str(count), *cells[:2], f"{100 * share:g} %, {scale:g}", *cells[2:]])
    heading = ["tasks", "CART", "accuracy", "the authors'", "from the base", "accuracy"]
    return markdown_table(heading, rows, ["---:"] * len(heading))


def ranks(records: list[dict[str, Any]]) -> Any:
    """Validation accuracy over the rank, with the best lambda of each; a panel a number of tasks.

    The paper's figure 1.
    """
    from matplotlib import pyplot as plt

    cases = records[0]["cases"]
    figure, panels = plt.subplots(
        1, len(TUNED_COUNTS), figsize=(13, 4), layout="constrained", sharey=True
    )
    colors = {AVERAGE: CART_COLOR, BASE: "#d1632b"}
    for axes, count in zip(panels, TUNED_COUNTS, strict=True):
        for centre in LAMBDAS:
            means = [100 * max(cases[rank_key(count, centre, share)].values()) for share in SHARES]
            shares = [100 * share for share in SHARES]
            axes.plot(shares, means, marker="o", ms=4, color=colors[centre], label=CENTRES[centre])
        average = 100 * max(cases[rank_key(count, AVERAGE, 1.0)].values())
        axes.axhline(average, color=LIMIT_COLOR, ls=":", lw=1.2, label="average")
        axes.set_xscale("log")
        axes.set_xticks([1, 2, 4, 8, 16, 32, 100], ["1", "2", "4", "8", "16", "32", "100"])
        axes.minorticks_off()
        axes.set_title(f"{count} tasks", fontsize=10)
        axes.set_xlabel("rank, in per cent of the full one")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3e7eb", zorder=0)
    panels[0].set_ylabel("mean validation accuracy in per cent")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _styles(methods: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    from matplotlib import pyplot as plt

    palette = plt.get_cmap("tab20")
    styles: dict[str, dict[str, Any]] = {
        method: {"color": palette(index % 20), "lw": 1.2} for index, method in enumerate(methods)
    }
    styles[AUTO] = {"color": CART_COLOR, "lw": 2.6, "zorder": 4}
    styles[TUNED] = {"color": CART_COLOR, "lw": 1.6, "ls": "-.", "zorder": 4}
    styles[FINE_TUNED] = {"color": LIMIT_COLOR, "ls": "--"}
    return styles


def number(records: list[dict[str, Any]]) -> Any:
    """Test accuracy over the number of merged tasks, mean over seeds."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
    styles = _styles(METHODS)
    for method in METHODS:
        if not _means(records, method, COUNTS[0]):
            continue
        means = [100 * statistics.fmean(_means(records, method, count)) for count in COUNTS]
        axes.plot(COUNTS, means, label=method, marker="o", ms=3, **styles[method])
    axes.set_xticks(COUNTS)
    axes.set_xlabel("merged tasks, in one order")
    axes.set_ylabel("mean test accuracy in per cent")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e7eb", zorder=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    return figure


def radar(records: list[dict[str, Any]]) -> Any:
    """Test accuracy by task as a share of the fine-tuned model's; a panel a number of tasks."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1,
        len(TUNED_COUNTS),
        figsize=(19, 6.4),
        layout="constrained",
        subplot_kw={"projection": "polar"},
    )
    styles = _styles(RADAR)
    for axes, count in zip(panels, TUNED_COUNTS, strict=True):
        alone = _by_task(records, FINE_TUNED, count)
        angles = [2 * math.pi * place / count for place in range(count)]
        for method in (one for one in RADAR if _means(records, one, count)):
            found = _by_task(records, method, count)
            shares = [100 * found[task] / max(alone[task], 1e-9) for task in alone]
            axes.plot([*angles, 0], [*shares, shares[0]], label=method, **styles[method])
        axes.set_xticks(angles, [TASKS[task].title for task in alone], fontsize=8)
        axes.set_ylim(0, 105)
        axes.set_title(f"{count} tasks", fontsize=11)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.15, 0.5), frameon=False)
    figure.suptitle("per cent of the fine-tuned model's test accuracy", fontsize=10)
    return figure


def _by_task(records: list[dict[str, Any]], method: str, count: int) -> dict[str, float]:
    held = [record["cases"][method][str(count)] for record in records if method in record["cases"]]
    return {task: statistics.fmean(one[task] for one in held) for task in held[0]}
