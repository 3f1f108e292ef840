"""`python -m benchmarks.theory.curves`: the paper's figures 2 and 3 on the suites' encoders.

R(k), what truncation leaves out of the differences, and I(k), what their row spaces have in common,
around the average and from the base, for several numbers of tasks: means and spread over the
layers. I(k) is drawn with two scales: of the k directions alone, as the paper defines it, and of
the whole difference, which cannot fall.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor

from benchmarks import theory as own
from benchmarks.common.colors import CART_COLOR
from benchmarks.common.commands import out_option, report_option, workers_option
from benchmarks.common.provenance import made_by
from benchmarks.common.record import Record, conditions
from benchmarks.common.tables import markdown_table
from benchmarks.common.training import in_processes
from benchmarks.suites import load_encoders, task_order
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import truncated_svd
from cart_plugin.merging.interference import (
    interference,
    pair_interferences,
    reconstruction_errors,
)
from cart_plugin.merging.tensors import is_decomposed, matrix_shape

SUITES = ("vision", "text")
COUNTS = (4, 8)
SHARES = (0.01, 0.02, 0.04, 0.08, 0.12, 0.16, 0.24, 0.32, 0.48, 0.64, 0.8, 1.0)
SHOWN = (0.01, 0.04, 0.08, 0.16, 0.32, 0.64)
CENTRES = {"average": "around the average", "base": "from the base"}
BASE_COLOR = "#d1632b"


def measured(suite: str, folder: Path) -> None:
    """Measure the matrices of a suite's first seed; what is known is not done again."""
    current = conditions(("linalg", "merging"), ("torch",), timed=False, own=own.REVISION)
    record = Record(folder / f"{suite}.json", current)
    tasks = task_order(suite)
    held = None
    for count in COUNTS:
        if str(count) in record.cases:
            continue
        held = held or load_encoders(suite, 0, "validation", 1, tasks)
        base = held.base()
        tuned = [held.tuned[task] for task in tasks[:count]]
        found = {}
        for name, start in base.items():
            if is_decomposed(name, start.shape):
                shape = matrix_shape(name, start.shape)
                weights = [one[name].reshape(shape) for one in tuned]
                if all(torch.equal(one, weights[0]) for one in weights):
                    continue  # no training reaches it, such as BERT's pooler
                mean = torch.stack(weights).mean(dim=0)
                found[name] = {
                    "average": _curves([one - mean for one in weights]),
                    "base": _curves([one - start.reshape(shape) for one in weights]),
                }
        record.put(str(count), found)
        click.echo(f"{suite}: {count} tasks, {len(found)} matrices")


def _curves(differences: list[Tensor]) -> dict[str, list[float]]:
    """R, I and I of the whole difference, at `SHARES`, each as a share of what it can be."""
    parts = [truncated_svd(one, RankRule(1.0), svd="exact") for one in differences]
    energies = torch.stack([one.double().square().sum(dim=(1, 2)) for one in differences])
    full = parts[0].rank
    ranks = [max(1, int(share * full)) for share in SHARES]
    pairs = pair_interferences(parts, ranks)
    held = torch.stack(
        [
            torch.stack([part.S[0, :rank].double().square().sum() for part in parts])
            for rank in ranks
        ]
    ) / energies.sum(dim=1)  # (ranks, T)
    roots = held.clamp(0, 1).sqrt()
    whole = pairs * (roots[:, None, :, None] * roots[:, None, None, :])
    most = len(parts) * (len(parts) - 1)
    found = {
        "R": reconstruction_errors(parts, energies, ranks) / energies.sum(),
        "I": interference(pairs) / most,
        "whole": interference(whole) / most,
    }
    return {
        curve: [round(value, 5) for value in values.tolist()] for curve, values in found.items()
    }


def results(folder: Path) -> dict[str, Any]:
    """The records: by suite, number of tasks and matrix."""
    import json

    found: dict[str, Any] = {"suites": {}, "measured": []}
    for suite in SUITES:
        path = folder / f"{suite}.json"
        if path.exists():
            held = json.loads(path.read_text())
            found["suites"][suite] = held["cases"]
            found["measured"] += held["measured"]
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """A table a suite and number of tasks."""
    parts = [
        "R(k), the share of the squared differences that rank k leaves out, and I(k), relative to "
        "equal models, around the average and from the base: means over the matrices of the "
        "suite's encoders (first seed). `below`: matrices of which I(k) is lower around the "
        "average. `of the whole`: I(k) with singular values relative to the whole difference, "
        f"which cannot fall. {made_by('bench-theory', result['measured'])}"
    ]
    for suite, cases in result["suites"].items():
        for count, matrices in cases.items():
            rows = [_row(share, list(matrices.values())) for share in SHOWN]
            heading = [
                *(f"{suite}, {count} tasks: rank", "R, average", "R, base", "I, average"),
                *("I, base", "below", "of the whole, average", "of the whole, base"),
            ]
            parts.append(markdown_table(heading, rows, ["---", *["---:"] * 7]))
            parts.append(_least(list(matrices.values())))
    return "\n\n".join(parts) + "\n"


def _row(share: float, matrices: list[Mapping[str, Any]]) -> list[str]:
    at = SHARES.index(share)

    def mean(curve: str, centre: str) -> str:
        return f"{statistics.fmean(one[centre][curve][at] for one in matrices):.3f}"

    below = sum(one["average"]["I"][at] < one["base"]["I"][at] for one in matrices)
    return [
        f"{share:.0%}",
        *(mean("R", centre) for centre in CENTRES),
        *(mean("I", centre) for centre in CENTRES),
        f"{below} of {len(matrices)}",
        *(mean("whole", centre) for centre in CENTRES),
    ]


def _least(matrices: list[Mapping[str, Any]]) -> str:
    """Where R + I is least: the rank that the two would choose between them."""
    found = {}
    for curve in ("I", "whole"):
        sums = [
            statistics.fmean(
                one["average"]["R"][at] + one["average"][curve][at] for one in matrices
            )
            for at in range(len(SHARES))
        ]
        found[curve] = SHARES[sums.index(min(sums))]
    return (
        f"Around the average R + I is least at {found['I']:.0%} of the rank; with I of the whole "
        f"difference at {found['whole']:.0%}."
    )


def plot(result: Mapping[str, Any]) -> Any:
    """R and I over the rank: a row a suite and number of tasks; bands are quartiles of matrices."""
    from matplotlib import pyplot as plt

    cases = [
        (f"{suite}, {count} tasks", list(matrices.values()))
        for suite, found in result["suites"].items()
        for count, matrices in found.items()
    ]
    titles = {"R": "R(k), of all", "I": "I(k), of equal models", "whole": "I(k) of the whole"}
    figure, panels = plt.subplots(
        len(cases), 3, figsize=(11, 2.9 * len(cases)), layout="constrained", squeeze=False
    )
    for row, (title, matrices) in zip(panels, cases, strict=True):
        for axes, (curve, words) in zip(row, titles.items(), strict=True):
            for (centre, label), color in zip(
                CENTRES.items(), (CART_COLOR, BASE_COLOR), strict=True
            ):
                values = torch.tensor([one[centre][curve] for one in matrices])
                low, high = values.quantile(torch.tensor([0.25, 0.75]), dim=0)
                axes.fill_between(SHARES, low, high, color=color, alpha=0.18, lw=0)
                axes.plot(SHARES, values.mean(dim=0), color=color, lw=1.8, label=label)
            axes.set_title(f"{title}: {words}", fontsize=9)
            axes.set_xscale("log")
            axes.set_xticks([0.01, 0.08, 0.32, 1], ["1 %", "8 %", "32 %", "100 %"])
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e3e7eb")
    panels[0][0].legend(frameon=False, fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("rank, share of the full one")
    return figure


@click.command()
@workers_option
@out_option("theory")
@report_option
@click.option("--suites", default=",".join(SUITES), show_default=True, help="Which.")
def main(workers: int, out: Path, only_report: bool, suites: str) -> None:
    """Measure R(k) and I(k) of the suites' encoders, and draw them."""
    from matplotlib import pyplot as plt

    folder = out / "curves"
    if not only_report:
        in_processes([partial(measured, suite, folder) for suite in suites.split(",")], workers)
    result = results(folder)
    (out / "curves.md").write_text(markdown(result))
    figure = plot(result)
    figure.savefig(out / "curves.png", dpi=130)
    plt.close(figure)
    click.echo((out / "curves.md").read_text())


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.theory.curves")
