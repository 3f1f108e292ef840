"""Truncated SVD solvers side by side: `make bench-solvers`.

Times, errors and error estimates of cart_plugin's solvers and of those that people use instead, on
matrices of a model's shapes. All solvers take turns in one process, so that a change of the
machine's load meets them all; the tables come from medians. A full SVD serves all ratios of a
matrix, since its time does not depend on them.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.common.cache import cache_root
from benchmarks.common.commands import progress, resume_option
from benchmarks.common.gpu import card, gpu_results
from benchmarks.common.measure import RESULTS
from benchmarks.common.record import Record, conditions
from benchmarks.demo.models import MISSING
from benchmarks.solvers import report
from benchmarks.solvers.contestants import (
    CUDA_SOLVERS,
    FULL,
    SOLVERS,
    Factors,
    full_svd,
    randomized_svd,
    svds,
)
from benchmarks.solvers.matrices import BF16, REAL, SPECTRA, MatrixMaker, Reference
from cart_plugin.linalg.gram import PARTIAL_SIDE

SHAPES = (
    (384, 384),
    (384, 1536),
    (768, 768),
    (768, 3072),
    (1024, 1024),
    (2816, 1024),
    (2048, 2048),
    (2048, 8192),
    (4096, 4096),
)
REAL_SHAPES = ((384, 384), (384, 1536))
RATIOS = (0.08, 0.16)
QUICK_SHAPES = ((384, 384), (384, 1536), (768, 768))
QUICK_RATIOS = (0.08, 0.32)
# Squares, and the other matrices of a layer of Llama 3 8B.
CUDA_SHAPES = (
    *((1024, 1024), (1024, 4096), (2048, 2048), (4096, 4096)),
    *((14336, 4096), (8192, 8192)),
)
CUDA_SPECTRA = ("power law 0.5", f"power law 0.5{BF16}")
CUDA_RATIOS = (0.08,)
_CUDA_FULL_SIDE = 2048  # a GPU's full SVD of larger ones may take longer than there is

PACKAGES = ("torch", "scipy", "scikit-learn", "numpy")

# What ARPACK and the randomised solvers may cost, as m * n * k: beyond that a call takes
# many seconds, and a case is left out (and recorded as such).
_WORK_LIMITS = {
    "svds": 1e9,
    "svd_lowrank, niter 2": 2e10,
    "svd_lowrank, niter 4": 1e10,
    "randomized_svd": 6e9,
}


@dataclass(frozen=True)
class Effort:
    """How often to run: until `seconds` are spent or `most` runs made, but at least `least`."""

    seconds: float
    least: int
    most: int

    def wants_more(self, runs: Sequence[float]) -> bool:
        """Whether these runs, in seconds, are not enough."""
        return len(runs) < self.least or (len(runs) < self.most and sum(runs) < self.seconds)


def _shape(text: str) -> tuple[int, int]:
    m, _, n = text.partition("x")
    return int(m), int(n)


def _listed(convert: Callable[[str], Any]) -> Callable[..., Any]:
    """A click callback for a list with commas."""

    def parse(_context: click.Context, _option: click.Parameter, value: str | None) -> Any:
        try:
            return None if value is None else [convert(part.strip()) for part in value.split(",")]
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    return parse


def _spectrum(text: str) -> str:
    if text.removesuffix(BF16) not in SPECTRA:
        raise ValueError(f"{text!r} is none of {', '.join(SPECTRA)}")
    return text


@click.command()
@click.option("--shapes", callback=_listed(_shape), help="Such as 768x768,768x3072; default: all.")
@click.option("--ratios", callback=_listed(float), help="Rank ratios; default: all.")
@click.option("--spectra", callback=_listed(_spectrum), help=f"Of: {', '.join(SPECTRA)}.")
@click.option("--quick", is_flag=True, help="Three small shapes, two ratios, few repetitions.")
@click.option("--cuda", is_flag=True, help="On the GPU: its own shapes, in fp32 and bf16.")
@resume_option
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results.")
def main(
    shapes: Sequence[tuple[int, int]] | None,
    ratios: Sequence[float] | None,
    spectra: Sequence[str] | None,
    quick: bool,
    cuda: bool,
    resume: bool,
    out: Path | None,
) -> None:
    """Compare the solvers; results go to benchmarks/results, or with --quick to the cache."""
    console = Console()
    shapes = shapes or (QUICK_SHAPES if quick else CUDA_SHAPES if cuda else SHAPES)
    ratios = ratios or (QUICK_RATIOS if quick else CUDA_RATIOS if cuda else RATIOS)
    spectra = spectra or (CUDA_SPECTRA if cuda else SPECTRA)
    place = gpu_results() / "solvers" if cuda else RESULTS / "solvers"
    out = out or (cache_root() / "solvers-quick" if quick else place)
    gpu: dict[str, Any] = {"gpu": card()} if cuda else {}
    current = conditions(("linalg",), PACKAGES, threads=torch.get_num_threads(), quick=quick, **gpu)
    record = Record(out / "results.json", current, resume)
    if record.discarded:
        console.print(f"Starting anew: {out / 'results.json'} was {record.discarded}")
    solvers = CUDA_SOLVERS if cuda else SOLVERS
    _warm_up(solvers, "cuda" if cuda else "cpu")
    matrices = [(shape, spectrum) for shape in shapes for spectrum in spectra]
    # On a GPU that is lent for minutes what is measured when the time is over counts.
    with progress() as bar, suppress(KeyboardInterrupt) if cuda else nullcontext():
        task = bar.add_task("", total=len(matrices))
        for shape, spectrum in matrices:
            bar.update(task, description=f"{shape[0]}x{shape[1]}, {spectrum}")
            measure_matrix(shape, spectrum, ratios, record, quick, cuda=cuda)
            bar.advance(task)
    cases = list(record.cases.values())
    if not any(case["solvers"] for case in cases):
        raise click.ClickException("nothing was measured")
    given = (record.conditions, record.measured, cases)
    (out / "table.md").write_text(report.markdown(*given))
    (out / "summary.md").write_text(report.markdown(*given, [report.RATIO]))
    if not cuda:
        report.save_plot(cases, out / "time_error.png")
    for table in report.console_tables(cases):
        console.print(table)
    console.print(f"Saved to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def measure_matrix(
    shape: tuple[int, int],
    spectrum: str,
    ratios: Sequence[float],
    record: Record,
    quick: bool,
    *,
    cuda: bool = False,
) -> None:
    """Measure all solvers on one matrix at the ratios that the record lacks."""
    keys = {ratio: f"{shape[0]}x{shape[1]} | {spectrum} | {ratio:g}" for ratio in ratios}
    missing = [ratio for ratio in ratios if keys[ratio] not in record.cases]
    if not missing or (spectrum == REAL and shape not in REAL_SHAPES):
        return
    ranks = {ratio: max(1, int(ratio * min(shape))) for ratio in missing}
    x = MatrixMaker(*shape, device="cuda" if cuda else "cpu").make(spectrum)
    if x is None:
        # Nothing goes into the record: the next run may find the checkpoints.
        click.echo(f"left out {shape[0]}x{shape[1]}, {spectrum}: {MISSING}", file=sys.stderr)
        return
    reference = Reference(x, max(ranks.values()))
    load = os.getloadavg()[0]
    times, figures, omitted = _measure(x, shape, ranks, reference, quick)
    for ratio in missing:
        solvers = {
            name: {
                "seconds": round(statistics.median(runs), 6),
                "fastest": round(min(runs), 6),
                "runs": len(runs),
                **figures[ratio, name],
            }
            for (at, name), runs in times.items()
            if at == ratio
        }
        case = {
            "shape": list(shape),
            "spectrum": spectrum,
            "ratio": ratio,
            "k": ranks[ratio],
            "load_before": round(load, 2),
            "solvers": solvers,
            "omitted": {name: why for (at, name), why in omitted.items() if at == ratio},
        }
        record.put(keys[ratio], case)


Case = tuple[float, str]  # ratio, solver


def _measure(
    x: Tensor, shape: tuple[int, int], ranks: dict[float, int], reference: Reference, quick: bool
) -> tuple[dict[Case, list[float]], dict[Case, dict[str, Any]], dict[Case, str]]:
    """Run every solver at every rank in rounds: times, accuracies, and what was left out why."""
    solvers = CUDA_SOLVERS if x.is_cuda else SOLVERS
    quick = quick or x.is_cuda  # which is lent for minutes
    times: dict[Case, list[float]] = {(ratio, name): [] for ratio in ranks for name in solvers}
    figures: dict[Case, dict[str, Any]] = {}
    omitted: dict[Case, str] = {}
    full: list[float] = []
    for case in list(times):
        if reason := _too_slow(case[1], shape, ranks[case[0]], is_cuda=x.is_cuda):
            omitted[case] = reason
            del times[case]
    for round_ in range(_effort(shape, report.RATIO, quick).most):
        is_due = _effort(shape, report.RATIO, quick, full=True).wants_more(full)
        if is_due and any(name == FULL for _, name in times):
            elapsed, found = _timed(full_svd, x, min(shape))
            full.append(elapsed)
            for ratio, k in ranks.items() if not figures else ():
                figures[ratio, FULL] = _figures(_first(found, k), reference)
            del found
        for ratio, name in _rotated(times, round_):
            if name == FULL or not _effort(shape, ratio, quick).wants_more(times[ratio, name]):
                continue
            try:
                elapsed, found = _timed(solvers[name], x, ranks[ratio])
            except (ImportError, RuntimeError, ValueError) as error:
                omitted[ratio, name] = f"{type(error).__name__}: {error}"
                del times[ratio, name]
                continue
            times[ratio, name].append(elapsed)
            if (ratio, name) not in figures:
                figures[ratio, name] = _figures(found, reference)
            del found
    for ratio in ranks if full else ():
        times[ratio, FULL] = full
    return times, figures, omitted


def _effort(shape: tuple[int, int], ratio: float, quick: bool, full: bool = False) -> Effort:
    if quick:
        return Effort(seconds=0.3, least=1, most=3)
    # A bar rests on these.
    bar = ratio == report.RATIO and shape in report.BAR_SHAPES
    return Effort(seconds=12 if full else 2, least=3 if bar else 1, most=7 if bar or full else 3)


def _too_slow(name: str, shape: tuple[int, int], k: int, *, is_cuda: bool = False) -> str | None:
    if is_cuda:
        large = name == FULL and min(shape) > _CUDA_FULL_SIDE
        return f"too slow here: the full SVD of more than {_CUDA_FULL_SIDE} rows" if large else None
    limit, work = _WORK_LIMITS.get(name), shape[0] * shape[1] * k
    if limit is None or work <= limit:
        return None
    return f"too slow here: m * n * k is {work:.1e}, the limit is {limit:.1e}"


def _timed(solver: Callable[[Tensor, int], Factors], x: Tensor, k: int) -> tuple[float, Factors]:
    gc.disable()
    _wait_for(x)
    start = time.perf_counter()
    found = solver(x, k)
    _wait_for(x)
    elapsed = time.perf_counter() - start
    gc.enable()
    if x.is_cuda:
        return elapsed, found
    if solver in (svds, randomized_svd) or min(x.shape) >= PARTIAL_SIDE:  # `exact` uses scipy
        _settle()
    return elapsed, found


def _wait_for(x: Tensor) -> None:
    """Until its GPU, if it is on one, has done all that it was told."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _settle() -> None:
    """Let other libraries' threads fall asleep, and wake torch's.

    scipy, scikit-learn and torch have threads of their own, which spin on for a while after their
    work and take the cores from whoever comes next: up to five times the time, always to the same
    solver where the order is fixed.
    """
    time.sleep(0.1)
    x = torch.ones(384, 384)
    for _ in range(10):
        x @ x


def _first(found: Factors, k: int) -> Factors:
    return Factors(found.u[:, :k], found.s[:k], found.vh[:k])


def _figures(found: Factors, reference: Reference) -> dict[str, Any]:
    accuracy = reference.accuracy(found.u, found.s, found.vh)
    estimate = None if found.estimate is None else _rounded(found.estimate)
    return {
        "error": _rounded(accuracy.error),
        "excess": _rounded(accuracy.excess),
        "estimate": estimate,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _rotated(cases: Iterable[Case], by: int) -> list[Case]:
    """The cases, another one first each time: who follows whom should not decide."""
    cases = list(cases)
    by = by * 3 % max(1, len(cases))
    return cases[by:] + cases[:by]


def _warm_up(solvers: Mapping[str, Callable[[Tensor, int], Factors]], device: str) -> None:
    """Let every solver load its libraries and start its threads."""
    x = torch.randn(128, 160, generator=torch.Generator().manual_seed(0)).to(device)
    for solver in solvers.values():
        with suppress(ImportError):
            solver(x, 8)
