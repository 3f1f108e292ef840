"""`python -m benchmarks.auto.number`: accuracy against the number of merged models, on test splits.

Two models to eight with their base, of the image and the text suite: CART without hyperparameters,
with the base and without it, and other data-free methods with what their authors recommend. Only
the scale of task arithmetic is chosen, for each number of models, by `study` on the validation
split of the first seed. Experts that overlap are merged, too (`benchmarks.auto.members`).
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from torch import Tensor

from benchmarks.auto.members import (
    OVERLAPPING,
    Member,
    Sets,
    by_name,
    judge,
    members_of,
    needed,
    sets_of,
)
from benchmarks.auto.study import SCALES, mean, open_record, task_arithmetic
from benchmarks.common.beside import slug
from benchmarks.common.colors import CART_COLOR, LIMIT_COLOR
from benchmarks.common.commands import named, out_option, report_option, workers_option
from benchmarks.common.data_free import (
    DOGE,
    OF_TAUS,
    Tensors,
    merged_by,
    merged_state,
    scaled_sum,
)
from benchmarks.common.provenance import made_by
from benchmarks.common.tables import markdown_table, percent_cell
from benchmarks.common.training import in_processes
from benchmarks.suites import Encoders, load_encoders
from cart_plugin import CartSettings, merge_state_dicts

SUITES = ("vision", "text")
SEEDS = (0, 1, 2)
EXAMPLES = 150  # a task
PACKAGES = ("torch", "transformers", "mergekit", "fusion-bench")
AUTO = "cart_auto"
FINE_TUNED = "fine-tuned"

OF_MODELS: dict[str, tuple[CartSettings, bool]] = {  # and whether they are given the base
    AUTO: (CartSettings(lambda_="auto"), True),
    "cart_auto without the base": (CartSettings(lambda_="auto"), False),
    "cart, its defaults": (CartSettings(), False),
}
ARITHMETIC = "task arithmetic"
METHODS = (FINE_TUNED, "average", *OF_MODELS, ARITHMETIC, *OF_TAUS, DOGE)


def number(
    suite: str,
    seed: int,
    scales: Mapping[str, float],
    folder: Path,
    sets: Sets | None = None,
    methods: Sequence[str] = METHODS,
) -> None:
    """Judge everything on one suite and seed; what is known is not done again.

    Args:
        suite: `vision` or `text`.
        seed: of the fine-tuning; experts that overlap take the next one, too.
        scales: of task arithmetic, by number of models.
        folder: of the records.
        sets: which models are merged, by how many they are; those of `members_of` if None.
        methods: by name.
    """
    chosen_sets = members_of(suite) if sets is None else sets
    spared = {"revisions": lambda key: key not in OF_MODELS}
    known = {"examples": EXAMPLES, "scales": dict(scales)}
    record = open_record(folder / f"{suite}-{seed}.json", PACKAGES, spared, known)
    wanted = [method for method in methods if method not in record.cases]
    if not wanted:
        return
    held = [
        load_encoders(suite, (seed + offset) % len(SEEDS), "test", EXAMPLES, tasks)
        for offset, tasks in enumerate(needed(suite, chosen_sets))
    ]
    base = held[0].base()
    alone: dict[Member, float] = {}
    for method in wanted:
        started = time.perf_counter()
        found: dict[str, list[dict[str, float]]] = {}
        for count, chosen in chosen_sets.items():
            found[count] = []
            for members in chosen:
                if method == FINE_TUNED:
                    scores = {one: _alone(held, one, alone) for one in members}
                else:
                    tuned = [held[offset].tuned[task] for offset, task in members]
                    scores = judge(held, merge(method, tuned, base, scales[count]), members)
                found[count].append(by_name(scores, members))
        record.put(method, found)
        means = ", ".join(f"{count}: {100 * mean(found[count]):.1f}" for count in found)
        click.echo(f"{suite} {seed}: {means} | {method} ({time.perf_counter() - started:.0f} s)")


def _alone(held: Sequence[Encoders], one: Member, known: dict[Member, float]) -> float:
    """A member's own accuracy; each is judged once."""
    if one not in known:
        offset, task = one
        known |= judge(held, held[offset].tuned[task], [one])
    return known[one]


def merge(method: str, tuned: Sequence[Tensors], base: Tensors, scale: float) -> dict[str, Tensor]:
    """Merge models; other methods than ours average what is no matrix."""
    if method in OF_MODELS:
        settings, informed = OF_MODELS[method]
        return merge_state_dicts(tuned, settings, base=base if informed else None)
    if method in (ARITHMETIC, "average"):
        own = scale if method == ARITHMETIC else 1 / len(tuned)
        return merged_state(partial(scaled_sum, scale=own), tuned, base)
    return merged_by(method, tuned, base)


def scales_of(suite: str, folder: Path) -> dict[str, float]:
    """The scales of task arithmetic that `study` found best on the first validation split.

    Experts that overlap are three models.
    """
    cases = json.loads((folder / "study" / f"{suite}-{SEEDS[0]}.json").read_text())["cases"]
    found = {
        count: max(SCALES, key=lambda scale: mean(cases[task_arithmetic(scale)][count]))
        for count in sets_of(suite)
    }
    return found | {OVERLAPPING: found["3"]}


def results(folder: Path) -> dict[str, Any]:
    """What the records say: by suite, mean accuracies by method, number of models and seed.

    A method that costs too much for all seeds has those of fewer.
    """
    found: dict[str, Any] = {}
    measured: list[dict[str, Any]] = []
    for suite in SUITES:
        paths = [folder / "number" / f"{suite}-{seed}.json" for seed in SEEDS]
        records = [json.loads(path.read_text()) for path in paths if path.exists()]
        if not records:
            continue
        measured += [one for record in records for one in record["measured"]]
        methods = {
            method: {
                count: [
                    mean(record["cases"][method][count])
                    for record in records
                    if method in record["cases"]
                ]
                for count in members_of(suite)
            }
            for method in METHODS
            if any(method in record["cases"] for record in records)
        }
        found[suite] = {"seeds": len(records), "methods": methods}
    return {"suites": found, "measured": measured}


def markdown(result: Mapping[str, Any]) -> str:
    """A table a suite: a row a method, a column a number of models; the best is bold."""
    parts = [
        f"Test accuracy in per cent ({EXAMPLES} examples a task), mean over fine-tuning seeds ± "
        "standard error, by the number of merged models (four pairs, two triples, and the first "
        "4, 6 and 8 tasks; overlapping: two models of one task and one of another, four times). "
        "Nothing is tuned but the scale of task arithmetic, on a validation split. Bold: the best "
        f"of those with all seeds. {made_by('bench-auto', result['measured'])}"
    ]
    for suite, held in result["suites"].items():
        methods = held["methods"]
        counts = list(methods[AUTO])
        merged = [
            title
            for title, means in methods.items()
            if title != FINE_TUNED and len(means[counts[0]]) == held["seeds"]
        ]
        best = {
            count: max(merged, key=lambda title: statistics.fmean(methods[title][count]))
            for count in counts
        }
        rows = [
            [
                _of_seeds(title, len(means[counts[0]]), held["seeds"]),
                *(percent_cell(means[count], bold=best[count] == title) for count in counts),
            ]
            for title, means in methods.items()
        ]
        heading = [_title(suite, held), *(_heading(count) for count in counts)]
        parts.append(markdown_table(heading, rows, ["---", *["---:"] * len(counts)]))
    return "\n\n".join(parts) + "\n"


def _title(suite: str, held: Mapping[str, Any]) -> str:
    seeds = held["seeds"]
    return f"{suite}, {seeds} seed" + ("s" if seeds > 1 else "")


def _of_seeds(title: str, found: int, seeds: int) -> str:
    """A row's name, which says where fewer seeds than the suite has are behind it."""
    return title if found == seeds else f"{title} ({found} of {seeds} seeds)"


def _heading(count: str) -> str:
    return "3, overlapping" if count == OVERLAPPING else f"{count} models"


def plot(result: Mapping[str, Any]) -> Any:
    """Accuracy over the number of models, a panel a suite."""
    from matplotlib import pyplot as plt

    suites = result["suites"]
    figure, panels = plt.subplots(
        1, len(suites), figsize=(6.2 * len(suites) + 1.6, 4.6), layout="constrained", squeeze=False
    )
    others = [method for method in METHODS if method not in (AUTO, FINE_TUNED)]
    palette = plt.get_cmap("tab20")
    styles: dict[str, dict[str, Any]] = {
        method: {"color": palette(index), "lw": 1.2, "marker": "o", "ms": 3}
        for index, method in enumerate(others)
    }
    styles[AUTO] = {"color": CART_COLOR, "lw": 2.6, "marker": "o", "ms": 5, "zorder": 4}
    styles[FINE_TUNED] = {"color": LIMIT_COLOR, "ls": "--"}
    for axes, (suite, held) in zip(panels[0], suites.items(), strict=True):
        for title, means in held["methods"].items():
            points = {
                int(count): 100 * statistics.fmean(over_seeds)
                for count, over_seeds in means.items()
                if count != OVERLAPPING
            }
            found = len(next(iter(means.values())))
            # Of another set of seeds: no line between means that do not compare.
            few = {} if found == held["seeds"] else {"ls": "none", "marker": "x", "ms": 5}
            label = _of_seeds(title, found, held["seeds"])
            axes.plot(points.keys(), points.values(), label=label, **{**styles[title], **few})
        axes.set_title(_title(suite, held), fontsize=10)
        axes.set_xlabel("merged models")
        axes.set_ylabel("mean test accuracy in per cent")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3e7eb", zorder=0)
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    return figure


def write_report(folder: Path) -> None:
    """Write `number.md` and `number.png`."""
    from matplotlib import pyplot as plt

    result = results(folder)
    (folder / "number.md").write_text(markdown(result))
    figure = plot(result)
    figure.savefig(folder / "number.png", dpi=150)
    plt.close(figure)


@click.command()
@workers_option
@out_option("auto")
@report_option
@click.option("--suites", default=",".join(SUITES), show_default=True, help="Which.")
@click.option("--seeds", default=",".join(map(str, SEEDS)), show_default=True, help="Which.")
@click.option("--methods", default=",".join(map(slug, METHODS)), help="All by default.")
def main(workers: int, out: Path, only_report: bool, suites: str, seeds: str, methods: str) -> None:
    """Merge two models to eight by every data-free method, and judge that on the test splits."""
    titles = {slug(method): method for method in METHODS}
    chosen = [titles[name] for name in named("--methods", methods, titles)]
    if not only_report:
        todo = [
            partial(number, suite, int(seed), scales_of(suite, out), out / "number", methods=chosen)
            for seed in seeds.split(",")
            for suite in suites.split(",")
        ]
        in_processes(todo, workers)
    write_report(out)
    click.echo((out / "number.md").read_text())


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.auto.number")
