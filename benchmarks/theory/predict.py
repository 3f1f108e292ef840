"""`python -m benchmarks.theory.predict`: do measures of weights foretell accuracy?

The merges of `benchmarks.auto.number`, whose accuracies are recorded, are made again from the
cached encoders and measured without judging them: what they keep and lose of each model, on
stand-ins for its inputs (no data), and on real ones.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks import theory
from benchmarks.auto.number import ARITHMETIC, AUTO, FINE_TUNED, OVERLAPPING, members_of
from benchmarks.common.commands import out_option, report_option, workers_option
from benchmarks.common.data_free import OF_TAUS
from benchmarks.common.measure import RESULTS
from benchmarks.common.provenance import made_by
from benchmarks.common.record import Record, conditions
from benchmarks.common.tables import markdown_table
from benchmarks.common.training import in_processes
from benchmarks.suites import Encoders, load_encoders, task_order
from cart_plugin.inspect.activations import Examples, Subject, collect
from cart_plugin.inspect.measures import judged_on
from cart_plugin.inspect.weights import AUTO as AUTO_WITHOUT
from cart_plugin.inspect.weights import AUTO_WITH_BASE, AVERAGE, CART, Weight, leading, of_tensors
from cart_plugin.linalg.rules import RankRule
from cart_plugin.merging.informed import MOST_INFORMED
from cart_plugin.merging.span_measures import Answers, answers

NUMBER = RESULTS / "auto" / "number"
IMAGES = 64  # a task, of the validation split, for the measures on real inputs
PACKAGES = ("torch", "transformers")
_MEAN_OF_TWO = 5  # revision of `merging` from which on four models are merged by two forms
KINDS = {
    "kept": "kept, no data",
    "lost": "lost, no data",
    "kept on inputs": "kept, on 64 inputs a task",
    "lost on inputs": "lost (the interference L), on the same",
}


def measured(suite: str, seed: int, folder: Path) -> None:
    """Measure the merges of one suite and seed; what is known is not done again."""
    told = json.loads((NUMBER / f"{suite}-{seed}.json").read_text())
    current = conditions(
        ("linalg", "merging"), PACKAGES, timed=False, own=theory.REVISION, images=IMAGES
    )
    record = Record(folder / f"{suite}-{seed}.json", current)
    seeds = (seed, (seed + 1) % 3)
    held: list[Encoders] = []
    with tempfile.TemporaryDirectory() as scratch:
        inputs: dict[tuple[int, str], Any] = {}
        known = members_of(suite)
        # Those that tell most first.
        for count in sorted(known, key=lambda count: (count in ("2", OVERLAPPING), count)):
            for number, members in enumerate(known[count]):
                key = f"{count} {number}"
                if key in record.cases:
                    continue
                if not held:
                    tasks = task_order(suite)
                    held = [load_encoders(suite, one, "validation", IMAGES, tasks) for one in seeds]
                for offset, task in members:
                    if (offset, task) not in inputs:
                        inputs[offset, task] = _inputs(held[offset], task, Path(scratch), offset)
                scale = told["conditions"]["scales"][count]
                others = [method for method in OF_TAUS if method in told["cases"]]
                heard = [inputs[member] for member in members]
                found = _group(held, members, scale, others, heard)
                record.put(key, {"members": [list(member) for member in members], "methods": found})
                click.echo(f"{suite} {seed}: {key} of {len(known[count])}")


def _inputs(held: Encoders, task: str, scratch: Path, offset: int) -> Any:
    """What the layers of a task's encoder get on images of its validation split."""
    from PIL import Image

    from benchmarks.vision.tasks import load_split

    folder = scratch / task
    if not folder.exists():
        folder.mkdir()
        for number, image in enumerate(load_split(task, "validation").head(IMAGES).images):
            Image.fromarray(image).convert("RGB").save(folder / f"{number:03}.png")
    file = scratch / f"{task}-{offset}.safetensors"
    side = [held.folders[task], held.pretrained]
    subject = Subject(task, held.folders[task], None, False, side)
    return collect(subject, Examples.read(folder), file, lambda *_: None)


def _group(
    held: Sequence[Encoders],
    members: Sequence[tuple[int, str]],
    scale: float,
    others: Sequence[str],
    inputs: Sequence[Any],
) -> dict[str, dict[str, list[float]]]:
    """By method and kind: shares of each model's own answers, over all weights."""
    tuned = [held[offset].tuned[task] for offset, task in members]
    count, names = len(members), [f"{task} {offset}" for offset, task in members]
    sums: dict[str, dict[str, Tensor]] = {}
    torch.manual_seed(0)  # for the masks of DARE
    for name, start in held[0].base().items():
        weight = of_tensors(name, [one[name] for one in tuned], names, start)
        if not isinstance(weight, Weight):
            continue
        _, m, n = weight.shape
        few = [leading(part, RankRule().fixed_rank(m, n) or 1) for part in weight.around.parts]
        got = {index: one.of(name, weight.shape) for index, one in enumerate(inputs)}
        heard = {index: weight.answer(index, one) for index, one in got.items() if one is not None}
        taus = [(one[name] - start).reshape(weight.shape) for one in tuned]
        for method, total in _merges(weight, taus, scale, others):
            found = sums.setdefault(method, {})
            judged = {"": answers(few, total)}
            if heard:
                judged[" on inputs"] = judged_on(total, heard, count)
            for kind, values in judged.items():
                held_so_far = found.setdefault(kind, torch.zeros(3, count, dtype=torch.float64))
                held_so_far += torch.stack(list(values))
    return {
        method: {
            f"{what}{kind}": _shares(Answers(*values), what)
            for kind, values in kinds.items()
            for what in ("kept", "lost")
        }
        for method, kinds in sums.items()
    }


def _merges(
    weight: Weight, taus: Sequence[Tensor], scale: float, others: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """What each method of `benchmarks.auto.number` adds to the base."""
    found = dict(weight.merges())
    average = found[AVERAGE]
    yield "average", average
    # Of two models both are the average; of many the base is left out.
    yield "cart, its defaults", found.get(CART, average)
    without = found.get(AUTO_WITHOUT, average)
    yield "cart_auto without the base", without
    yield AUTO, found.get(AUTO_WITH_BASE, without)
    yield ARITHMETIC, scale * len(taus) * average
    for method in others:
        stacks = zip(*taus, strict=True)
        yield method, torch.stack([OF_TAUS[method](matrices) for matrices in stacks])


def _shares(found: Answers, what: str) -> list[float]:
    values: Tensor = found.along if what == "kept" else found.beside
    return (values / found.own).tolist()


def points(suite: str, folder: Path) -> Iterator[dict[str, Any]]:
    """What is known of each merge and model: measures, and the share of its accuracy."""
    for path in sorted(folder.glob(f"{suite}-*.json")):
        number = json.loads((NUMBER / path.name).read_text())
        told, revision = number["cases"], number["conditions"]["revisions"]["merging"]
        for key, case in json.loads(path.read_text())["cases"].items():
            count, place = key.split()
            for method, kinds in case["methods"].items():
                if method not in told:
                    continue
                if method == AUTO and count == str(MOST_INFORMED) and revision < _MEAN_OF_TWO:
                    continue
                accuracy, own = (told[name][count][int(place)] for name in (method, FINE_TUNED))
                yield {
                    "group": (path.stem, key),
                    "count": count,
                    "method": method,
                    "tasks": len(accuracy),
                    "accuracy": statistics.fmean(accuracy.values()),
                    "share": statistics.fmean(accuracy[task] / own[task] for task in accuracy),
                    "of tasks": [accuracy[task] / own[task] for task in accuracy],
                    **kinds,
                }


def results(folder: Path) -> dict[str, Any]:
    """By kind: rank correlations with accuracy, and how many pairs of methods are told apart."""
    found: dict[str, Any] = {}
    made: list[Any] = []
    for suite in ("vision", "text"):
        known = list(points(suite, folder))
        if not known:
            continue
        made += [
            one
            for path in folder.glob(f"{suite}-*.json")
            for one in json.loads(path.read_text())["measured"]
        ]
        groups: dict[Any, list[dict[str, Any]]] = {}
        for point in known:
            groups.setdefault(point["group"], []).append(point)
        kinds = [kind for kind in KINDS if kind in known[0]]
        found[suite] = {
            "groups": len(groups),
            "kinds": {kind: _judged(kind, known, list(groups.values())) for kind in kinds},
            "regret": _regret(list(groups.values())),
        }
    return {"suites": found, "measured": made}


def _judged(
    kind: str, known: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    sign = 1 if kind.startswith("kept") else -1
    value = lambda point: sign * statistics.fmean(point[kind])  # noqa: E731
    every = spearmanr([value(point) for point in known], [point["share"] for point in known])
    single = [
        (sign * measure, share)
        for point in known
        for measure, share in zip(point[kind], point["of tasks"], strict=True)
    ]
    within = [
        spearmanr([value(point) for point in group], [point["share"] for point in group]).statistic
        for group in groups
        if len({point["share"] for point in group}) > 1
    ]
    right = told = 0
    for group in groups:
        for one, other in itertools.combinations(group, 2):
            if abs(one["accuracy"] - other["accuracy"]) > 2 * _error(one, other):
                told += 1
                right += (value(one) > value(other)) == (one["accuracy"] > other["accuracy"])
    return {
        "all merges": float(every.statistic),
        "all models": float(spearmanr(*zip(*single, strict=True)).statistic),
        "methods of one set of models": statistics.fmean(within) if within else float("nan"),
        "right": right,
        "pairs": told,
    }


def _error(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Standard error of the difference of two accuracies, as if of independent examples."""
    from benchmarks.auto.number import EXAMPLES

    return (
        sum(
            point["accuracy"] * (1 - point["accuracy"]) / (EXAMPLES * point["tasks"])
            for point in (one, other)
        )
        ** 0.5
    )


def _regret(groups: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What is lost by the method that `mergekit-cart inspect` recommends, in points of accuracy."""
    losses = []
    for group in groups:
        by_method = {point["method"]: point["accuracy"] for point in group}
        if AUTO in by_method:
            losses.append(100 * (max(by_method.values()) - by_method[AUTO]))
    return {"mean": statistics.fmean(losses), "worst": max(losses), "groups": len(losses)}


def markdown(result: Mapping[str, Any]) -> str:
    """A table a suite: a row a measure."""
    heading = [
        "measure",
        *("all merges", "all models of all merges", "methods of one set of models"),
        "pairs of methods told right",
    ]
    parts = [
        "Spearman's rank correlation of measures of the weights with accuracy on the test split "
        "(as a share of each model's own), over the merges of `make bench-auto`: sets of two to "
        "eight models by data-free methods. Pairs of methods: of one set of models, whose "
        "accuracies differ by more than two standard errors. "
        f"{made_by('bench-theory', result['measured'])}"
    ]
    for suite, held in result["suites"].items():
        rows = [
            [
                KINDS[kind],
                *(f"{found[key]:.2f}" for key in heading_keys()),
                f"{found['right']} of {found['pairs']} ({found['right'] / found['pairs']:.0%})",
            ]
            for kind, found in held["kinds"].items()
        ]
        ruler = ["---", *["---:"] * (len(heading) - 1)]
        parts.append(f"**{suite}, {held['groups']} sets of models**")
        parts.append(markdown_table(heading, rows, ruler))
        regret = held["regret"]
        parts.append(
            f"What `mergekit-cart inspect` recommends was {regret['mean']:.1f} points behind the "
            f"best of these methods on average over {regret['groups']} sets, {regret['worst']:.1f} "
            "at worst."
        )
    return "\n\n".join(parts) + "\n"


def heading_keys() -> tuple[str, ...]:
    """The correlations, in the table's order."""
    return ("all merges", "all models", "methods of one set of models")


@click.command()
@workers_option
@out_option("theory")
@report_option
@click.option("--suites", default="vision", show_default=True, help="Which.")
@click.option("--seeds", default="0,1", show_default=True, help="Which.")
def main(workers: int, out: Path, only_report: bool, suites: str, seeds: str) -> None:
    """Measure merges whose accuracies are recorded, and see whether that foretells them."""
    folder = out / "predict"
    if not only_report:
        todo = [
            partial(measured, suite, int(seed), folder)
            for suite in suites.split(",")
            for seed in seeds.split(",")
        ]
        in_processes(todo, workers)
    text = markdown(results(folder))
    (out / "predict.md").write_text(text)
    click.echo(text)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.theory.predict")
