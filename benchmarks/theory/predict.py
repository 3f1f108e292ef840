"""`python -m benchmarks.theory.predict`: do measures of weights foretell accuracy?

Merges whose accuracies are recorded are made again from the cached models and measured without
judging them: what they keep and lose of each model, on stand-ins for its inputs (no data), and on
real ones. They are those of `benchmarks.auto.number`, of `benchmarks.theory.subsets`, and of
`benchmarks.llm`. `foretold` makes the table.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor

from benchmarks import theory
from benchmarks.auto.members import Member, members_of
from benchmarks.auto.number import ARITHMETIC, AUTO, SEEDS
from benchmarks.common import peers
from benchmarks.common.commands import out_option, report_option, workers_option
from benchmarks.common.data_free import OF_TAUS
from benchmarks.common.measure import RESULTS
from benchmarks.common.record import Record, conditions
from benchmarks.common.training import in_processes
from benchmarks.suites import Encoders, load_encoders, task_order
from benchmarks.theory import inputs, subsets
from benchmarks.theory.foretold import markdown, results
from benchmarks.theory.language import measured_models
from benchmarks.theory.merges import measure
from cart_plugin.inspect.activations import Activations
from cart_plugin.inspect.measures import REVISION as INSPECT
from cart_plugin.inspect.merges import AUTO as AUTO_WITHOUT
from cart_plugin.inspect.merges import AUTO_WITH_BASE, AVERAGE, CART
from cart_plugin.inspect.weights import Weight, of_tensors

NUMBER = RESULTS / "auto" / "number"
LLM = RESULTS / "llm"
PACKAGES = ("torch", "transformers")
Sets = Mapping[str, Sequence[tuple[Member, ...]]]


def open_record(path: Path, *rooms: str) -> Record:
    """A record of measures, and what decides them: rooms of the plugin beside the core."""
    current = conditions(
        ("linalg", "merging", *rooms),
        PACKAGES,
        timed=False,
        own=theory.REVISION,
        inspect=INSPECT,
        peers=peers.REVISION,
        examples=inputs.EXAMPLES,
    )
    return Record(path, current)


def measured(
    suite: str, seed: int, told: Path, sets: Sets, file: Path, methods: Sequence[str]
) -> None:
    """Measure the merges of encoders of one suite and seed; what is known is not done again.

    Args:
        suite: `vision` or `text`.
        seed: of the first models; those of another one in a set have the next.
        told: the record of the accuracies.
        sets: which models are merged, by how many they are.
        file: the record of the measures.
        methods: of `OF_TAUS`: those whose accuracies are known are measured, beside the others.
    """
    judged = json.loads(told.read_text())
    record = open_record(file)
    held: dict[int, Encoders] = {}
    heard: dict[Member, Activations] = {}
    with tempfile.TemporaryDirectory() as scratch:

        def encoders(offset: int) -> Encoders:
            if offset not in held:
                own = (seed + offset) % len(SEEDS)
                tasks = task_order(suite)
                held[offset] = load_encoders(suite, own, "validation", inputs.EXAMPLES, tasks)
            return held[offset]

        def hear(member: Member) -> Activations:
            if member not in heard:
                offset, task = member
                folder = Path(scratch) / str(offset)
                heard[member] = inputs.of_encoder(suite, encoders(offset), task, folder)
            return heard[member]

        for count, chosen in sets.items():
            scale = judged["conditions"]["scales"][count]
            for place, members in enumerate(chosen):
                key = f"{count} {place}"
                known = record.cases.get(key)
                others = [
                    method
                    for method in methods
                    if method in judged["cases"] and not (known and method in known["methods"])
                ]
                if known and not others:
                    continue
                tuned = [encoders(offset).tuned[task] for offset, task in members]
                base = encoders(0).base()
                torch.manual_seed(0)  # for the masks of DARE
                found = measure(
                    _weights(base, tuned, members),
                    partial(_merges, base=base, tuned=tuned, scale=scale, others=others),
                    [hear(member) for member in members],
                )
                if known:  # of methods that were not yet there
                    found["methods"] = known["methods"] | found["methods"]
                record.put(
                    key, {"members": [list(member) for member in members]} | found, adds=True
                )
                click.echo(f"{file.stem}: {key} of {len(chosen)}")


def _weights(
    base: Mapping[str, Tensor], tuned: Sequence[Mapping[str, Tensor]], members: Sequence[Member]
) -> Iterator[Weight]:
    names = [f"{task} {offset}" for offset, task in members]
    for name, start in base.items():
        weight = of_tensors(name, [one[name] for one in tuned], names, start)
        if isinstance(weight, Weight):
            yield weight


def _merges(
    weight: Weight,
    base: Mapping[str, Tensor],
    tuned: Sequence[Mapping[str, Tensor]],
    scale: float,
    others: Sequence[str],
) -> Iterator[tuple[str, Tensor]]:
    """What each method of `benchmarks.auto.number` adds to the base."""
    taus = [(one[weight.name] - base[weight.name]).reshape(weight.shape) for one in tuned]
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


def parts(folder: Path, methods: Sequence[str]) -> dict[str, Callable[[], None]]:
    """What there is to measure, by name, the sets that no rule was made by first."""
    found: dict[str, Callable[[], None]] = {}
    for suite, seed in subsets.SEEDS.items():
        told = folder / "subsets" / f"{suite}-{seed}.json"
        if told.exists() and AUTO in json.loads(told.read_text())["cases"]:
            name = f"subsets-{suite}-{seed}"
            file = folder / "predict" / f"{name}.json"
            sets = subsets.drawn(suite)
            found[name] = partial(measured, suite, seed, told, sets, file, methods)
    for told in sorted(NUMBER.glob("*.json"), reverse=True):
        suite, number = told.stem.split("-")
        file = folder / "predict" / told.name
        sets = members_of(suite)
        found[told.stem] = partial(measured, suite, int(number), told, sets, file, methods)
    for start, told in (("one", LLM), ("own", LLM / "own_starts")):
        if (told / "results.json").exists():
            name = f"llm-{start}"
            file = folder / "predict" / f"{name}.json"
            found[name] = partial(_language, told / "results.json", file)
    return found


def _language(told: Path, file: Path) -> None:
    measured_models(told, open_record(file, "adapters"))


@click.command()
@workers_option
@out_option("theory")
@report_option
@click.option("--parts", "names", default="", help="Which, with commas between; all by default.")
@click.option(
    "--methods",
    default=",".join(OF_TAUS),
    help="Those of `benchmarks.common.data_free` that are measured, too, where they were judged.",
)
def main(workers: int, out: Path, only_report: bool, names: str, methods: str) -> None:
    """Measure merges whose accuracies are recorded, and see whether that foretells them."""
    todo = parts(out, methods.split(","))
    if not only_report:
        in_processes([todo[name] for name in (names.split(",") if names else todo)], workers)
    text = markdown(results(out))
    (out / "predict.md").write_text(text)
    click.echo(text)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.theory.predict")
