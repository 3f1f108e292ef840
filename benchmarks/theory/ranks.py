"""`python -m benchmarks.theory.ranks`: does anything name the rank that is best for CART?

The image suite's eight models of the first seed at six ranks and seven scales, whose accuracies on
the validation split `make bench-vision` recorded: beside R(k) and I(k) (`curves`), and beside what
each of these merges keeps and loses, measured without data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from scipy.stats import spearmanr
from torch import Tensor

from benchmarks import theory
from benchmarks.common.commands import out_option, report_option
from benchmarks.common.measure import RESULTS
from benchmarks.common.provenance import made_by
from benchmarks.common.record import Record, conditions
from benchmarks.common.tables import markdown_table
from benchmarks.suites import load_encoders, task_order
from benchmarks.theory.foretold import LABELS, value
from benchmarks.theory.geometry import SHARES
from benchmarks.theory.merges import measure
from cart_plugin.inspect.measures import REVISION as INSPECT
from cart_plugin.inspect.merges import AVERAGE
from cart_plugin.inspect.weights import Weight, of_tensors
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import truncated_svd
from cart_plugin.merging.spans import leading

SUITE, SEED = "vision", 0
KINDS = ("kept", "lost")
SUMS = {"R": ("R",), "I": ("I",), "R + I": ("R", "I"), "R + I of the whole": ("R", "whole")}


def accuracies() -> dict[tuple[float, float], float]:
    """By rank ratio and lambda, on the validation split."""
    results = json.loads((RESULTS / "vision" / "results.json").read_text())
    return {
        (row["rank_ratio"], row["scaling_factor"]): row["mean"]
        for row in results["curves"]["rank_and_lambda"]
    }


def measured(path: Path) -> None:
    """Measure CART's merges at these settings, unless that is done."""
    settings = list(accuracies())
    current = conditions(
        ("linalg", "merging"), ("torch",), timed=False, own=theory.REVISION, inspect=INSPECT
    )
    record = Record(path, current)
    if SUITE in record.cases:
        return
    tasks = task_order(SUITE)
    held = load_encoders(SUITE, SEED, "validation", 1, tasks)
    tuned = [held.tuned[task] for task in tasks]

    def weights() -> Iterator[Weight]:
        for name, start in held.base().items():
            weight = of_tensors(name, [one[name] for one in tuned], tasks, start)
            if isinstance(weight, Weight):
                yield weight

    def merges(weight: Weight) -> Iterator[tuple[str, Tensor]]:
        found = [one[weight.name].reshape(weight.shape) for one in tuned]
        mean = sum(found) / len(found)
        most = RankRule(max(ratio for ratio, _ in settings))
        parts = [truncated_svd(one - mean, most, svd="exact") for one in found]
        offset = dict(weight.merges())[AVERAGE]
        for ratio in sorted({ratio for ratio, _ in settings}):
            rank = RankRule(ratio).fixed_rank(*weight.shape[1:])
            total = sum(leading(part, rank or 1).dense() for part in parts)
            for at, lambda_ in settings:
                if at == ratio:
                    yield f"{ratio:g} {lambda_:g}", offset + lambda_ * total

    record.put(SUITE, measure(weights(), merges)["methods"])


def results(out: Path) -> dict[str, Any]:
    """A row a rank; and rank correlations over the ranks, and over all settings."""
    record = json.loads((out / "ranks.json").read_text())
    told, judged = record["cases"][SUITE], accuracies()
    matrices = json.loads((out / "curves" / f"{SUITE}.json").read_text())["cases"]["8"].values()
    ratios = sorted({ratio for ratio, _ in judged})
    rows = []
    for ratio in ratios:
        own = {lambda_: one for (at, lambda_), one in judged.items() if at == ratio}
        best = max(own, key=lambda lambda_: own[lambda_])
        free = {
            kind: max(value(told[f"{ratio:g} {lambda_:g}"], kind) for lambda_ in own)
            for kind in KINDS
        }
        curves = {
            curve: sum(one["average"][curve][SHARES.index(ratio)] for one in matrices)
            / len(matrices)
            for curve in ("R", "I", "whole")
        }
        sums = {name: sum(curves[curve] for curve in parts) for name, parts in SUMS.items()}
        rows.append(
            {"ratio": ratio, "best": own[best], "lambda": best, "one": own[1.0]} | sums | free
        )
    over_ranks = {
        name: float(
            spearmanr(
                [row["best"] for row in rows],
                [row[name] if name in KINDS else -row[name] for row in rows],
            ).statistic
        )
        for name in (*SUMS, *KINDS)
    }
    over_settings = {
        kind: float(
            spearmanr(
                list(judged.values()),
                [value(told[f"{ratio:g} {lambda_:g}"], kind) for ratio, lambda_ in judged],
            ).statistic
        )
        for kind in KINDS
    }
    return {
        "rows": rows,
        "over ranks": over_ranks,
        "over settings": over_settings,
        "settings": len(judged),
        "measured": record["measured"],
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The table, and which rank each measure would have chosen."""
    rows: Sequence[Mapping[str, Any]] = result["rows"]
    heading = ["rank", "accuracy, best lambda", "lambda", "at lambda 1", *SUMS, "kept", "lost"]
    cells = [
        [
            f"{row['ratio']:.0%}",
            f"{100 * row['best']:.1f}",
            f"{row['lambda']:g}",
            f"{100 * row['one']:.1f}",
            *(f"{row[name]:.3f}" for name in SUMS),
            f"{row['kept']:.0%}",
            f"{-row['lost']:.0%}",
        ]
        for row in rows
    ]
    cells.append(
        [
            "correlation with the accuracy",
            *[""] * 3,
            *(f"{result['over ranks'][name]:.2f}" for name in (*SUMS, *KINDS)),
        ]
    )
    cells.append(
        [
            "the rank that it names",
            *[""] * 3,
            *(f"{min(rows, key=lambda row: row[name])['ratio']:.0%}" for name in SUMS),
            *(f"{max(rows, key=lambda row: row[kind])['ratio']:.0%}" for kind in KINDS),
        ]
    )
    best = max(rows, key=lambda row: row["best"])
    return (
        "CART of the image suite's eight models (first seed) by rank: mean validation accuracy in "
        "per cent at the best of seven lambdas and at lambda 1 (`make bench-vision`); R(k) and "
        "I(k) around the average, means over the matrices (the less, the better by the paper); "
        "and what the merge keeps and loses without data, each at its best lambda. The best rank "
        f"is {best['ratio']:.0%}. Correlations are Spearman's, with the sign that the measure "
        f"should have. {made_by('bench-theory', result['measured'])}\n\n"
        + markdown_table(heading, cells, ["---", *["---:"] * (len(heading) - 1)])
        + f"\n\nOver all {result['settings']} settings of rank and lambda the correlation with "
        "accuracy is "
        + " and ".join(
            f"{rho:.2f} for {LABELS[kind]}" for kind, rho in result["over settings"].items()
        )
        + ".\n"
    )


@click.command()
@out_option("theory")
@report_option
def main(out: Path, only_report: bool) -> None:
    """Measure CART's merges at many ranks, and see what tells the best one."""
    if not only_report:
        measured(out / "ranks.json")
    (out / "ranks.md").write_text(markdown(results(out)))
    click.echo((out / "ranks.md").read_text())


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.theory.ranks")
