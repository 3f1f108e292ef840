"""`python -m benchmarks.vision` (`make bench-vision`): merging methods on the vision suite.

Fine-tunes (or finds) one encoder a task and seed, lays out the suite for FusionBench, chooses each
method's setting on the validation split of the first seed, and evaluates the chosen one on the test
split of every seed. Every finished step is in the cache or in the record, so that the same command
goes on where it stopped. Reports and plots are made from `results.json` alone:
`python -m benchmarks.vision --report`.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin on a busy machine

from benchmarks.common import peers
from benchmarks.common.cache import write_json
from benchmarks.common.commands import out_option, publish, report_option, workers_option
from benchmarks.common.measure import RESULTS
from benchmarks.common.record import MERGES, Record, conditions
from benchmarks.common.sources import SourceError
from benchmarks.vision.methods import METHODS
from benchmarks.vision.plots import save_plots
from benchmarks.vision.report import markdown
from benchmarks.vision.results import results
from benchmarks.vision.run import Plan, Run, of_a_peer, of_the_plugin
from benchmarks.vision.tasks import SUITE, TASKS

PACKAGES = ("fusion-bench", "torch", "transformers", "numpy", "scipy", "lightning", "hydra-core")


def prepare(plan: Plan, workers: int, console: Console) -> dict[str, Any]:
    """Images, encoders and the suite's folder; returns what decides their tensors."""
    from benchmarks.vision.backbone import prepare_backbone
    from benchmarks.vision.finetune import finetune_all
    from benchmarks.vision.pool import write_suite
    from benchmarks.vision.strength import strength
    from benchmarks.vision.tasks import prepare_task

    started = time.perf_counter()
    console.print(f"images and encoders: {len(plan.tasks)} tasks, seeds {plan.seeds}")
    pretrained = prepare_backbone()
    for name in plan.tasks:
        prepare_task(name)
    settings = {name: strength(name) for name in plan.tasks}
    encoders = {
        seed: finetune_all(list(plan.tasks), seed, settings, workers) for seed in plan.seeds
    }
    write_suite(encoders, pretrained)
    console.print(f"  {time.perf_counter() - started:.0f} s", highlight=False)
    return {
        "pretrained": pretrained.name,
        "fine_tuning": {name: asdict(value) for name, value in settings.items()},
        "data": {name: prepare_task(name).name for name in plan.tasks},
    }


@click.command()
@click.option("--tasks", default=",".join(SUITE), show_default=True, help="Tasks, by name.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Of the fine-tuning.")
@click.option("--methods", default=",".join(METHODS), help="Keys of methods; all by default.")
@click.option("--validation-images", default=100, show_default=True, help="A task.")
@click.option("--test-images", default=500, show_default=True, help="A task.")
@click.option("--curves/--no-curves", default=True, help="Also run what the plots need.")
@workers_option
@out_option("vision")
@click.option("--fresh", is_flag=True, help="Forget what is known (encoders are kept).")
@report_option
def main(
    tasks: str,
    seeds: str,
    methods: str,
    validation_images: int,
    test_images: int,
    curves: bool,
    workers: int,
    out: Path,
    fresh: bool,
    only_report: bool,
) -> None:
    """Compare merging methods on the vision suite."""
    console = Console()
    if only_report and not (out / "results.json").exists():
        raise click.ClickException(f"{out} has no results.json; run without --report first")
    if not only_report:
        plan = Plan(
            tuple(_known(tasks, TASKS)),
            _numbers(seeds),
            validation_images,
            test_images,
            tuple(_known(methods, METHODS)),
            curves,
        )
        if out == RESULTS / "vision" and plan != Plan():
            raise click.ClickException("these are not the suite's own settings: name an --out")
        try:
            write_json(out / "results.json", run_suite(plan, out, workers, console, fresh))
        except SourceError as error:
            raise click.ClickException(str(error)) from None
    found = json.loads((out / "results.json").read_text())
    save_plots(found, out)
    publish(markdown(found), out / "table.md", console)


def run_suite(
    plan: Plan, out: Path, workers: int, console: Console, fresh: bool = False
) -> dict[str, Any]:
    """Do a plan; return the results as plain data (see `results`)."""
    inputs = prepare(plan, workers, console)
    # Not timed: FusionBench's imports change the numbers of threads; workers use one.
    current = conditions(MERGES, PACKAGES, timed=False, peers=peers.REVISION, **inputs)
    spared = {
        "revisions": lambda case: not of_the_plugin(case),
        "peers": lambda case: not of_a_peer(case),
    }
    record = Record(out / "cases.json", current, not fresh, spared)
    if record.discarded:
        console.print(f"earlier cases are done again: {record.discarded}")
    run = Run(plan, record, workers, console)
    run.tune()
    run.test()
    if plan.curves:
        run.curves()
    return results(run)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise click.ClickException(f"--seeds {text} is not a list such as 0,1,2") from None


def _known(names: str, table: dict[str, Any]) -> list[str]:
    found = [name.strip() for name in names.split(",")]
    unknown = [name for name in found if name not in table]
    if unknown:
        raise click.ClickException(f"unknown: {', '.join(unknown)}; known are {', '.join(table)}")
    return found
