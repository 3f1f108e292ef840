"""`python -m benchmarks.theory.curves`: the paper's figures 2 and 3 on the suites' models.

R(k), what truncation leaves out of the differences, and I(k), what their row spaces have in common,
around the average and from the base, for several numbers of tasks: means and spread over the
layers. I(k) is drawn with two scales: of the k directions alone, as the paper defines it, and of
the whole difference, which cannot fall. Beside it, for all directions, what I would be around the
average if the models' differences had nothing in common (`in_common`).
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor

from benchmarks.common.colors import CART_COLOR
from benchmarks.common.commands import out_option, report_option, workers_option
from benchmarks.common.provenance import made_by
from benchmarks.common.record import Record, conditions
from benchmarks.common.tables import markdown_table
from benchmarks.common.training import in_processes
from benchmarks.suites import load_encoders, task_order
from benchmarks.theory.geometry import SHARES, curves_of, in_common, of_matrices
from cart_plugin.inspect.weights import Weight
from cart_plugin.merging.tensors import is_decomposed, matrix_shape

REVISION = 1
"""Raised when what is measured here comes to be something else."""

ENCODERS = ("vision", "text")
ADAPTERS = {"llm": True, "llm-own-starts": False}
"""LoRA adapters of the language model, which of a seed begin with one A or each with its own."""
SUITES = (*ENCODERS, *ADAPTERS)
COUNTS = (4, 8)
COMMON = "in common"
SHOWN = (0.01, 0.04, 0.08, 0.16, 0.32, 0.64)
CENTRES = {"average": "around the average", "base": "from the base"}
BASE_COLOR = "#d1632b"


def measured(suite: str, folder: Path) -> None:
    """Measure the matrices of a suite's first seed; what is known is not done again."""
    current = conditions(("linalg", "merging"), ("torch",), timed=False, own=REVISION)
    record = Record(folder / f"{suite}.json", current)
    counts = COUNTS if suite in ENCODERS else COUNTS[:1]
    wanted = [key for count in counts for key in (str(count), f"{count} {COMMON}")]
    missing = [key for key in wanted if key not in record.cases]
    if not missing:
        return
    models = _Encoders(suite) if suite in ENCODERS else _Adapters(ADAPTERS[suite])
    for key in missing:
        count, common = int(key.split()[0]), COMMON in key
        record.put(key, dict(models.common(count) if common else models.curves(count)))
        click.echo(f"{suite}: {key}, {len(record.cases[key])} matrices")


class _Encoders:
    """Whole models of one of the suites of encoders."""

    def __init__(self, suite: str) -> None:
        self._tasks = task_order(suite)
        held = load_encoders(suite, 0, "validation", 1, self._tasks)
        self._base, self._tuned = held.base(), held.tuned

    def _differences(self, count: int) -> Iterator[tuple[str, list[Tensor]]]:
        """From the base, ``(stack, m, n)``; none of what no training reaches (BERT's pooler)."""
        tuned = [self._tuned[task] for task in self._tasks[:count]]
        for name, start in self._base.items():
            if is_decomposed(name, start.shape):
                shape = matrix_shape(name, start.shape)
                deltas = [(one[name] - start).reshape(shape) for one in tuned]
                if not all(torch.equal(one, deltas[0]) for one in deltas):
                    yield name, deltas

    def curves(self, count: int) -> Iterator[tuple[str, Any]]:
        for name, deltas in self._differences(count):
            mean = torch.stack(deltas).mean(dim=0)
            around = {"average": [one - mean for one in deltas], "base": deltas}
            yield name, {where: curves_of(of_matrices(found)) for where, found in around.items()}

    def common(self, count: int) -> Iterator[tuple[str, Any]]:
        for name, deltas in self._differences(count):
            yield name, in_common(deltas)


class _Adapters:
    """LoRA adapters of the language model, in coordinates that their factors span."""

    def __init__(self, one_start: bool) -> None:
        from benchmarks.llm.backbone import prepare_backbone
        from benchmarks.llm.finetune import FineTuning, finetune_all
        from benchmarks.llm.tasks import QUESTIONS
        from cart_plugin.inspect.factors import Adapters

        tuned = finetune_all(list(QUESTIONS), 0, FineTuning(one_start=one_start))
        paths = [str(one.adapter) for one in tuned.values()]
        base = str(prepare_backbone())
        self._source = Adapters(paths, paths, list(tuned), base, None)

    def _weights(self) -> Iterator[Weight]:
        for name in self._source.weights:
            weight = self._source.read(name)
            if isinstance(weight, Weight):
                yield weight

    def curves(self, _: int) -> Iterator[tuple[str, Any]]:
        for weight in self._weights():
            full = min(weight.shape[1:])
            around = {"average": weight.centred, "base": weight.around}
            yield (
                weight.name,
                {
                    where: curves_of((found.parts, found.energies), full)
                    for where, found in around.items()
                },
            )

    def common(self, _: int) -> Iterator[tuple[str, Any]]:
        for weight in self._weights():
            yield weight.name, in_common([part.dense() for part in weight.around.parts])


def results(folder: Path) -> dict[str, Any]:
    """The records: by suite, number of tasks and matrix."""
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
        "R(k), the share of the squared differences that rank k leaves out, and I(k), the "
        "mean of the pairs of models (1 for equal differences of one direction, ``1 / sqrt(k)`` "
        "for equal ones of k of one strength), around the average and from the base: means over "
        "the matrices of the suite's models (first seed). `below`: matrices of which I(k) is "
        "lower around the average. `of the whole`: I(k) with singular values relative to the "
        f"whole difference, which cannot fall. {made_by('bench-theory', result['measured'])}"
    ]
    for suite, cases in result["suites"].items():
        for count, matrices in _curves_in(cases):
            rows = [_row(share, list(matrices.values())) for share in SHOWN]
            heading = [
                *(f"{suite}, {count} tasks: rank", "R, average", "R, base", "I, average"),
                *("I, base", "below", "of the whole, average", "of the whole, base"),
            ]
            parts.append(markdown_table(heading, rows, ["---", *["---:"] * 7]))
            parts.append(_least(list(matrices.values())))
    return "\n\n".join(parts) + "\n"


def centring(result: Mapping[str, Any]) -> str:
    """A table that says why I around the average is not below the one from the base."""
    rows = []
    for suite, cases in result["suites"].items():
        for key, matrices in cases.items():
            if COMMON in key:
                means = {
                    name: statistics.fmean(one[name] for one in matrices.values())
                    for name in ("cosine", "base", "average", "mixed")
                }
                below = sum(one["average"] < one["base"] for one in matrices.values())
                rows.append(
                    [
                        f"{suite}, {key.split()[0]} tasks",
                        *(f"{value:.3f}" for value in means.values()),
                        f"{below} of {len(matrices)}",
                    ]
                )
    words = (
        "I of all directions, means over pairs of models and over matrices, and what centring does "
        "to it. Around the average a difference holds `1/T` of every other one. `Mixed`: what I "
        "around the average would be by that alone, if models had nothing in common: of equal "
        "norms its squares sum to no less than those from the base "
        "(`benchmarks/theory/geometry.py` says why). What centring takes off is a common part, of "
        "which the cosine of the differences tells. `Below`: matrices of which I is lower around "
        "the average. "
        f"{made_by('bench-theory', result['measured'])}"
    )
    heading = ["suite", "cosine", "I, base", "I, average", "mixed", "below"]
    return f"{words}\n\n{markdown_table(heading, rows, ['---', *['---:'] * 5])}\n"


def _curves_in(cases: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """By number of tasks; what centring mixes in is beside them."""
    return [(key, matrices) for key, matrices in cases.items() if key.isdecimal()]


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
        for count, matrices in _curves_in(found)
    ]
    titles = {"R": "R(k), of all", "I": "I(k), mean of the pairs", "whole": "I(k) of the whole"}
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
    (out / "centring.md").write_text(centring(result))
    figure = plot(result)
    figure.savefig(out / "curves.png", dpi=130)
    plt.close(figure)
    click.echo((out / "curves.md").read_text())


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.theory.curves")
