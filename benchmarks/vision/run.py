"""What a run of the suite does, and in which order: settings are tuned, then tested, then curves.

Every finished case is in the record, so that a run goes on where the one before it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console

from benchmarks.common.fusion import Method, Point
from benchmarks.common.record import Record
from benchmarks.vision.jobs import Case, Job, mean, run_all
from benchmarks.vision.methods import (
    BY_TASKS,
    CALIBRATED,
    HEAT,
    INDEXING_RATIOS,
    INDIVIDUAL,
    METHODS,
    PEER,
    PRETRAINED,
)
from benchmarks.vision.program import command
from benchmarks.vision.tasks import SUITE


@dataclass(frozen=True)
class Plan:
    """What a run does.

    Args:
        tasks: to merge, in the order in which the curve over their number adds them.
        seeds: of the fine-tuning; settings are chosen on the first.
        validation: images a task for choosing.
        test: images a task for the table.
        methods: keys of `methods.METHODS`.
        curves: also run what only the plots need.
    """

    tasks: tuple[str, ...] = SUITE
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
        # What failed is tried again.
        record.drop([name for name, case in record.cases.items() if "error" in case])

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


def of_a_peer(name: str) -> bool:
    """Whether `benchmarks.common.peers` decides a case."""
    return f" {PEER} " in name or f" {CALIBRATED} " in name


def short(name: str) -> str:
    """A command without what all have in common."""
    return name.partition("+experiment=vision ")[2]
