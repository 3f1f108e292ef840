"""What threads do to a merge of small matrices: `python -m benchmarks.solvers.threads`.

Four models' matrix is merged by `cart` as it is, side by side on few threads each, and as it would
be, one after the other on all threads; and a single decomposition by one thread and by all. Each on
a quiet machine and beside a process that keeps one core busy. All ways take turns within a run,
and a case is the medians and their quotient.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.common.cache import cache_root
from benchmarks.common.commands import progress, quick_option, resume_option, runs_option
from benchmarks.common.measure import RESULTS
from benchmarks.common.provenance import made_by
from benchmarks.common.record import Record, conditions
from benchmarks.common.tables import markdown_table
from benchmarks.solvers.matrices import MatrixMaker
from cart_plugin import CartSettings, RankRule, merge_tensors, truncated_svd
from cart_plugin.linalg import svd
from cart_plugin.merging import differences

MODELS = 4
RATIO = 0.08
SPECTRUM = "power law 0.5"
SHAPES = ((768, 768), (1024, 1024), (1024, 2816), (2048, 2048))
STACK = (8, (768, 768))  # experts of one layer
QUICK_SHAPES = ((96, 96),)
_BUSY = "import torch; torch.set_num_threads(1); x = torch.rand(256, 256)\nwhile True: x @ x"
_NAME = "model.layers.0.mlp.experts.up_proj"  # of stacks; what a matrix is called does not matter

Ways = Mapping[str, Callable[[], object]]


def merges(tensors: list[Tensor]) -> Ways:
    """A merge of four models' tensor in both ways."""

    def merged() -> object:
        return merge_tensors(tensors, CartSettings(rank_ratio=RATIO), name=_NAME)

    def one_after_the_other() -> object:
        with ExitStack() as patched:
            for module in (differences, svd):
                patched.enter_context(patch.object(module, "SIDE_BY_SIDE", 1))
                patched.enter_context(patch.object(module, "worth", _all_threads))
            return merged()

    return {"as it is": merged, "one after the other": one_after_the_other}


def decompositions(x: Tensor, solver: str) -> Ways:
    """A decomposition by one thread, and by all."""
    every = torch.get_num_threads()

    def by(threads: int) -> Callable[[], object]:
        def run() -> object:
            torch.set_num_threads(threads)
            try:
                return truncated_svd(x, RankRule(rank_ratio=RATIO), svd=solver)
            finally:
                torch.set_num_threads(every)

        return run

    return {"one thread": by(1), "all threads": by(every)}


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Ways]]]:
    """What is measured, by name; the matrices are made when it is their turn."""

    def matrices(shape: tuple[int, int], count: int) -> list[Tensor]:
        return [MatrixMaker(*shape, seed=10 * seed).make(SPECTRUM) for seed in range(count)]  # type: ignore[misc]

    def merge(shape: tuple[int, int]) -> Ways:
        return merges(matrices(shape, MODELS))

    def decompose(shape: tuple[int, int], solver: str) -> Ways:
        return decompositions(matrices(shape, 1)[0], solver)

    def merge_stacks(stack: int, shape: tuple[int, int]) -> Ways:
        held = matrices(shape, MODELS * stack)
        return merges([torch.stack(held[at::MODELS]) for at in range(MODELS)])

    for shape in QUICK_SHAPES if quick else SHAPES:
        name = f"{shape[0]}x{shape[1]}"
        yield f"merge | {name}", partial(merge, shape)
        for solver in ("fast", "exact"):
            yield f"{solver} | {name}", partial(decompose, shape, solver)
    stack, shape = (4, (96, 96)) if quick else STACK
    yield f"merge | {stack} of {shape[0]}x{shape[1]}", partial(merge_stacks, stack, shape)


def _all_threads(_m: int, _n: int) -> int:
    return torch.get_num_threads()


@contextmanager
def busy_core() -> Iterator[None]:
    """Another process computes on one core meanwhile."""
    program = [sys.executable, "-c", _BUSY]
    with subprocess.Popen(program, env={**os.environ, "OMP_NUM_THREADS": "1"}) as other:
        try:
            time.sleep(3)  # until it has begun
            yield
        finally:
            other.kill()


def measured(ways: Ways, runs: int) -> dict[str, Any]:
    """Milliseconds of each way, all in turns: medians."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for work in ways.values():
        work()
    for turn in range(runs):
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            begun = time.perf_counter()
            ways[name]()
            times[name].append(1e3 * (time.perf_counter() - begun))
    return {name: round(statistics.median(found), 2) for name, found in times.items()}


@click.command()
@quick_option
@runs_option(7)
@resume_option
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results.")
def main(quick: bool, runs: int, resume: bool, out: Path | None) -> None:
    """Measure both ways; results go to benchmarks/results, or with --quick to the cache."""
    console = Console()
    out = out or (cache_root() / "threads-quick" if quick else RESULTS / "solvers")
    current = conditions(
        ("linalg", "merging"), ("torch", "scipy"), threads=torch.get_num_threads(), runs=runs
    )
    record = Record(out / "threads.json", current, resume)
    if record.discarded:
        console.print(f"Starting anew: {out / 'threads.json'} was {record.discarded}")
    planned = list(cases(quick))
    with progress(console) as bar:
        task = bar.add_task("", total=2 * len(planned))
        for place in ("quiet", "busy"):
            with nullcontext() if place == "quiet" else busy_core():
                for name, ways in planned:
                    bar.update(task, description=f"{name}, {place}")
                    key = f"{name} | {place}"
                    if key not in record.cases:
                        load = round(os.getloadavg()[0], 1)
                        record.put(key, {"load_before": load, "ms": measured(ways(), runs)})
                    bar.advance(task)
    text = markdown(record.conditions, record.measured, record.cases)
    (out / "threads.md").write_text(text)
    console.print(text, markup=False)


def _tables(found: Mapping[str, Any]) -> Iterator[tuple[list[str], list[list[str]]]]:
    for is_merge in (True, False):
        rows, names = [], ("as it is", "one after the other")
        if not is_merge:
            names = ("one thread", "all threads")
        for key in found:
            what, matrix, place = key.split(" | ")
            if place != "quiet" or (what == "merge") is not is_merge:
                continue
            row = [matrix] if is_merge else [matrix, f"`{what}`"]
            for at in ("quiet", "busy"):
                times = found[f"{what} | {matrix} | {at}"]["ms"]
                first, second = (times[name] for name in names)
                row += [f"{first:.0f}", f"{second:.0f}", f"{second / first:.2f}"]
            rows.append(row)
        start = ["four models'" if is_merge else "matrix", *([] if is_merge else ["solver"])]
        ways = [f"{name}, ms" for name in names]
        heading = [*start, *ways, "quotient", *(f"{way}, busy" for way in ways), "quotient, busy"]
        yield heading, rows


def markdown(
    conditions: Mapping[str, Any], measured_with: list[dict[str, Any]], found: Mapping[str, Any]
) -> str:
    """Both tables, with what a reader needs to place the figures."""
    machine = conditions["machine"]
    where = f"on {machine['processor']}, {machine['cores']} cores, {conditions['threads']} threads"
    parts = [
        f"{made_by('bench-threads', measured_with, where)} Medians of {conditions['runs']}, all "
        f"ways in turns; rank ratio {RATIO:g}, {SPECTRUM}. Busy: beside a process that keeps one "
        "core busy."
    ]
    for heading, rows in _tables(found):
        parts.append(markdown_table(heading, rows))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
