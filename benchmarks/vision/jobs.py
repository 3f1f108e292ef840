"""The steps of a suite run, as functions that a worker process can do, and their order of work.

A *case* is one merged model evaluated on one split. It is known by its command, and a finished case
is never done again.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from benchmarks.common.fusion import Method, Point, between
from benchmarks.common.training import one_thread
from benchmarks.vision.program import command, evaluate, merge

Case = dict[str, Any]


def mean(case: Case) -> float:
    """Mean accuracy over the tasks."""
    return sum(case["accuracy"].values()) / len(case["accuracy"])


@dataclass(frozen=True)
class Job:
    """One merge, or two that give a line of merged models, and the evaluation of each.

    Args:
        method: what to run.
        point: its settings, without the scale if there are `scales`.
        pools: overrides of model and task pool.
        scales: values of the method's scale to evaluate.
    """

    method: Method
    point: Point
    pools: tuple[str, ...]
    scales: tuple[Any, ...] = ()

    def cases(self) -> dict[str, list[str]]:
        """The overrides of each case, by its command."""
        points = [self.point | {str(self.method.scale): scale} for scale in self.scales]
        lines = [[*self.method.overrides(point), *self.pools] for point in points or [self.point]]
        return {command(line): line for line in lines}


def run(job: Job) -> dict[str, Case]:
    """Do a job; a method that fails gives the error as its result."""
    try:
        found = _line(job) if len(job.scales) > 2 else _each(job)
    except Exception as error:
        failed = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        return dict.fromkeys(job.cases(), failed)
    return found


def _each(job: Job) -> dict[str, Case]:
    cases = {}
    for name, overrides in job.cases().items():
        merged = merge(overrides)
        cases[name] = {
            "accuracy": evaluate(merged.states, job.pools),
            "seconds": round(merged.seconds, 2),
            **merged.extra,
        }
    return cases


def _line(job: Job) -> dict[str, Case]:
    """Merge at the first and the last scale; the others lie on the line through both."""
    lines = list(job.cases().values())
    low, high = merge(lines[0]), merge(lines[-1])
    first, last = job.scales[0], job.scales[-1]
    cases = {}
    for scale, name in zip(job.scales, job.cases(), strict=True):
        share = (scale - first) / (last - first)
        states = {
            task: between(state, high.states[task], share) for task, state in low.states.items()
        }
        cases[name] = {"accuracy": evaluate(states, job.pools), **low.extra}
    return cases


def run_all(
    jobs: Sequence[Job],
    known: Callable[[str], bool],
    put: Callable[[dict[str, Case]], None],
    workers: int,
) -> None:
    """Do the jobs that have unknown cases, and hand over each one's cases.

    Args:
        jobs: what to do.
        known: whether a case is done.
        put: takes the cases of a finished job, in this process.
        workers: processes of one thread; 0 for this process.
    """
    todo = [job for job in jobs if not all(known(name) for name in job.cases())]
    for found in _results(todo, workers):
        put(found)


def _results(jobs: Sequence[Job], workers: int) -> Iterator[dict[str, Case]]:
    if workers < 1 or not jobs:
        yield from map(run, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=one_thread) as pool:
        waiting: list[Future[dict[str, Case]]] = [pool.submit(run, job) for job in jobs]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
