"""`python -m benchmarks.vision.suite` (`make bench-vision`): merging methods on the vision suite.

Fine-tunes (or finds) one encoder a task and seed, lays out the suite for FusionBench, chooses each
method's setting on the validation split of the first seed, and evaluates the chosen one on the test
split of every seed. Every finished step is in the cache or in the record, so that the same command
goes on where it stopped. Reports and plots are made from `results.json` alone:
`python -m benchmarks.vision.suite --report`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin on a busy machine

from benchmarks.common.cache import write_json
from benchmarks.common.incremental import Record, conditions
from benchmarks.common.measure import RESULTS
from benchmarks.common.sources import SourceError
from benchmarks.vision.suite_jobs import Case, Job, mean, run_all
from benchmarks.vision.suite_methods import (
    BY_TASKS,
    HEAT,
    INDEXING_RATIOS,
    INDIVIDUAL,
    METHODS,
    PRETRAINED,
    Method,
    Point,
)
from benchmarks.vision.suite_program import command
from benchmarks.vision.tasks import TASKS

TASK_ORDER = ("mnist", "georgian", "hangul", "fashion", "hiragana", "thai", "themes", "emoji")
PACKAGES = ("fusion-bench", "torch", "transformers", "numpy", "scipy", "lightning", "hydra-core")


@dataclass(frozen=True)
class Plan:
    """What a run does.

    Args:
        tasks: to merge, in the order in which the curve over their number adds them.
        seeds: of the fine-tuning; settings are chosen on the first.
        validation: images a task for choosing.
        test: images a task for the table.
        methods: keys of `suite_methods.METHODS`.
        curves: also run what only the plots need.
    """

    tasks: tuple[str, ...] = TASK_ORDER
    seeds: tuple[int, ...] = (0, 1, 2)
    validation: int = 100
    test: int = 500
    methods: tuple[str, ...] = tuple(METHODS)
    curves: bool = True

    @property
    def counts(self) -> range:
        """Numbers of tasks of the curve, without all of them."""
        return range(2, len(self.tasks), 2)

    def pools(self, split: str, seed: int | None = None, count: int | None = None) -> list[str]:
        """Overrides of the pools: a split, a seed, and the first `count` tasks."""
        seed = self.seeds[0] if seed is None else seed
        left_out = self.tasks[count:] if count else ()
        parts = [("modelpool", "models"), ("taskpool", "test_datasets"), ("taskpool", "heads")]
        parts += [("modelpool", "train_datasets"), ("modelpool", "test_datasets")]
        return [
            f"modelpool.seed={seed}",
            f"taskpool.split={split}",
            f"taskpool.images={getattr(self, split)}",
            *(["taskpool.precision=bf16"] if split == "validation" else []),
            *(f"~{pool}.{part}.{task}" for task in left_out for pool, part in parts),
        ]


class Run:
    """A plan and what is known of it.

    Args:
        plan: what to do.
        record: finished cases, by command.
        workers: processes at a time.
        console: for progress.
    """

    def __init__(self, plan: Plan, record: Record, workers: int, console: Console) -> None:
        self.plan, self.record, self.workers, self.console = plan, record, workers, console
        for name in [name for name, case in record.cases.items() if "error" in case]:
            del record.cases[name]  # what failed is tried again

    def case(self, method: Method, point: Point, pools: Sequence[str]) -> Case:
        """A finished case."""
        case: Case = self.record.cases[command([*method.overrides(point), *pools])]
        return case

    def do(self, title: str, jobs: Sequence[Job]) -> None:
        """Do the jobs that are not done."""
        started = time.perf_counter()
        cases = {name for job in jobs for name in job.cases()}
        done = len(cases & set(self.record.cases))
        self.console.print(f"{title}: {len(cases)} cases, {done} known", highlight=False)

        def put(found: dict[str, Case]) -> None:
            for name, case in found.items():
                if name in self.record.cases:  # chosen by already
                    continue
                self.record.put(name, case)
                told = case.get("error") or f"{100 * mean(case):.1f}"
                self.console.print(
                    f"  {told:>5}  {short(name)}", highlight=False, markup=False, soft_wrap=True
                )

        run_all(jobs, self.record.cases.__contains__, put, self.workers)
        self.console.print(f"  {time.perf_counter() - started:.0f} s", highlight=False)

    def tune(self) -> None:
        """Every setting of every grid, on the validation split."""
        pools = tuple(self.plan.pools("validation"))
        self.do(
            "validation", [job for key in self.plan.methods for job in _grid(METHODS[key], pools)]
        )

    def tried(self, key: str) -> list[tuple[Point, Case]]:
        """A method's settings with their validation cases."""
        pools = self.plan.pools("validation")
        method = METHODS[key]
        return [(point, self.case(method, point, pools)) for point in method.points()]

    def chosen(self, key: str) -> Point | None:
        """The setting that is best on the validation split; None if the method fails."""
        good = [(mean(case), point) for point, case in self.tried(key) if "error" not in case]
        return max(good, key=lambda entry: entry[0])[1] if good else None

    def entries(self) -> Iterator[tuple[str, Method, Point]]:
        """The table's rows: the two ends, and the methods that run with what was chosen."""
        yield "pretrained", PRETRAINED, {}
        yield "individual", INDIVIDUAL, {}
        for key in self.plan.methods:
            point = self.chosen(key)
            if point is not None:
                yield key, METHODS[key], point

    def test(self) -> None:
        """The chosen settings on the test split, for every seed."""
        jobs = [
            Job(method, point, tuple(self.plan.pools("test", seed)))
            for seed in self.plan.seeds
            for _, method, point in self.entries()
        ]
        self.do("test", jobs)

    def curves(self) -> None:
        """CART over rank and lambda, methods over the number of tasks, storage of CART-Indexing."""
        self.do("rank and lambda", list(_grid(HEAT, tuple(self.plan.pools("validation")))))
        self.do("number of tasks", list(self.by_tasks()))
        self.do("storage", [Job(*line) for line in self.indexing()])

    def by_tasks(self) -> Iterator[Job]:
        """The main methods with fewer tasks, as chosen for all of them."""
        for count in self.plan.counts:
            pools = tuple(self.plan.pools("test", count=count))
            yield Job(INDIVIDUAL, {}, pools)
            for key in BY_TASKS:
                point = self.chosen(key) if key in self.plan.methods else None
                if point is not None:
                    yield Job(METHODS[key], point, pools)

    def indexing(self) -> Iterator[tuple[Method, Point, tuple[str, ...]]]:
        """CART-Indexing at every rank, with lambda 1: at full rank the fine-tuned models."""
        for ratio in INDEXING_RATIOS:
            point = {"rank_ratio": ratio, "scaling_factor": 1.0}
            yield METHODS["cart_indexing"], point, tuple(self.plan.pools("test"))


def _grid(method: Method, pools: tuple[str, ...]) -> Iterator[Job]:
    for point, scales in method.groups():
        yield Job(method, point, pools, tuple(scales))


def of_the_plugin(name: str) -> bool:
    """Whether the plugin's core decides a case, and not FusionBench alone."""
    return " method=cart" in name and " method=cart/plain_adamerging" not in name


def short(name: str) -> str:
    """A command without what all have in common."""
    return name.partition("+experiment=vision ")[2]


def prepare(plan: Plan, workers: int, console: Console) -> dict[str, Any]:
    """Images, encoders and the suite's folder; returns what decides their tensors."""
    from benchmarks.vision.backbone import prepare_backbone
    from benchmarks.vision.finetune import finetune_all
    from benchmarks.vision.strength import strength
    from benchmarks.vision.suite_pool import write_suite
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
@click.option("--tasks", default=",".join(TASK_ORDER), show_default=True, help="Tasks, by name.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Of the fine-tuning.")
@click.option("--methods", default=",".join(METHODS), help="Keys of methods; all by default.")
@click.option("--validation-images", default=100, show_default=True, help="A task.")
@click.option("--test-images", default=500, show_default=True, help="A task.")
@click.option("--curves/--no-curves", default=True, help="Also run what the plots need.")
@click.option("--workers", default=2, show_default=True, help="Processes of one thread each.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=RESULTS / "vision", help="Results' folder."
)
@click.option("--fresh", is_flag=True, help="Forget what is known (encoders are kept).")
@click.option("--report", "only_report", is_flag=True, help="Tables and plots from the results.")
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
    from benchmarks.vision.suite_report import write_report

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
    write_report(json.loads((out / "results.json").read_text()), out)
    console.print((out / "table.md").read_text(), highlight=False, markup=False, soft_wrap=True)


def run_suite(
    plan: Plan, out: Path, workers: int, console: Console, fresh: bool = False
) -> dict[str, Any]:
    """Do a plan; return the results as plain data (see `suite_report`)."""
    from benchmarks.vision.suite_report import results

    inputs = prepare(plan, workers, console)
    current = conditions(PACKAGES, **inputs)
    del current[
        "environment"
    ]  # thread numbers, which FusionBench's imports change; workers use one
    spared = {"cart_plugin_sources": lambda case: not of_the_plugin(case)}
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


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.vision.suite")
