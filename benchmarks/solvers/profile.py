"""Where the time of the `fast` solver goes, and what it cannot go below: `make bench-profile`.

The floor of `fast` is the products with the matrix itself, two a block of the Krylov basis, timed
alone in the block size that the solver takes; that of `exact` the triangle of the Gram matrix, and
its eigenvalues without a vector. Shares come from torch's profiler.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.cache import write_json
from benchmarks.common.commands import out_option
from benchmarks.common.provenance import made_by, provenance
from benchmarks.common.record import conditions
from benchmarks.common.tables import markdown_table
from benchmarks.solvers.matrices import MatrixMaker
from benchmarks.solvers.report import BAR_SHAPES, RATIO, SPEED_BARS
from cart_plugin import RankRule, truncated_svd
from cart_plugin.linalg import krylov

SPECTRUM = "power law 0.5"
RUNS = 9
# torch's names of what the time goes to; all else is the overhead of small operations.
KINDS = {
    "products": ("aten::mm", "aten::bmm", "aten::addmm_", "aten::baddbmm_", "aten::addmm"),
    "small eigenproblem": ("aten::_linalg_eigh",),
    "Cholesky QR": ("aten::linalg_cholesky_ex", "aten::linalg_solve_triangular"),
}


def median(work: Callable[[], object], runs: int = RUNS) -> float:
    """Median time of some runs, in milliseconds."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def measured(x: Tensor) -> dict[str, Any]:
    """Time, floor and shares for one matrix."""
    rule = RankRule(rank_ratio=RATIO)
    bases: list[tuple[int, int]] = []
    extend = krylov._extend

    def noted(*args: Any) -> Any:
        found = extend(*args)
        bases.append((found[0].shape[-2], found[2].shape[-2]))
        return found

    with patch.object(krylov, "_extend", noted):
        truncated_svd(x, rule, svd="fast")
    basis, block = bases[-1]
    fast = median(lambda: truncated_svd(x, rule, svd="fast"))
    exact = median(lambda: truncated_svd(x, rule, svd="exact"), 3)
    full = median(lambda: torch.linalg.svd(x, full_matrices=False), 3)
    rows = torch.randn(block, x.shape[0])
    gram = x @ x.mT
    one = median(lambda: krylov.times_transposed(rows @ x, x))
    with profile(activities=[ProfilerActivity.CPU]) as events:
        truncated_svd(x, rule, svd="fast")
    own = {event.key: event.self_cpu_time_total for event in events.key_averages()}
    total = sum(own.values())
    shares = {
        kind: sum(own.get(name, 0) for name in names) / total for kind, names in KINDS.items()
    }
    return {
        "shape": list(x.shape),
        "basis": basis,
        "block": block,
        "fast_ms": round(fast, 2),
        "floor_ms": round(one * basis / block, 2),
        "gram_ms": round(median(lambda: x @ x.mT), 2),
        "exact_ms": round(exact, 2),
        "eigenvalues_ms": round(median(lambda: torch.linalg.eigvalsh(gram), 3), 2),
        "full_ms": round(full, 2),
        "shares": {kind: round(share, 3) for kind, share in shares.items()}
        | {"other": round(1 - sum(shares.values()), 3)},
    }


def rows_of(cases: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table."""
    kinds = [*KINDS, "other"]
    heading = ["matrix", "basis", "`fast` ms", "floor ms", "x xᵀ ms", *kinds]
    return heading, [
        [
            "x".join(map(str, case["shape"])),
            f"{case['basis']} in blocks of {case['block']}",
            f"{case['fast_ms']:.1f}",
            f"{case['floor_ms']:.1f}",
            f"{case['gram_ms']:.1f}",
            *(f"{100 * case['shares'][kind]:.0f} %" for kind in kinds),
        ]
        for case in cases
    ]


# `exact` forms 5/8 of the Gram matrix.
_TRIANGLE = 5 / 8


def bar_rows(cases: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Each bar on speed, what there is, and what there would be at the floor."""
    rows = []
    for solver, bars in SPEED_BARS.items():
        for case in cases:
            name = "x".join(map(str, case["shape"]))
            lowest = case["floor_ms"]
            if solver == "exact":
                lowest = _TRIANGLE * case["gram_ms"] + case["eigenvalues_ms"]
            full, own = case["full_ms"], case[f"{solver}_ms"]
            times = (f"{it:.1f}" for it in (full, own, lowest))
            ups = (f"{full / it:.1f}" for it in (own, lowest))
            rows.append([name, f"`{solver}`", *times, f"{bars[name]:g}", *ups])
    heading = ["matrix", "solver", "full SVD ms", "solver ms", "floor ms"]
    return [*heading, "bar: times as fast", "measured", "at the floor"], rows


def markdown(result: dict[str, Any]) -> str:
    """The table with its caption."""
    threads = result["conditions"]["threads"]
    where = f"on {result['conditions']['machine']['processor']}"
    return (
        f"`fast` at ratio {RATIO:g}, {SPECTRUM}, on {threads} threads. Floor of `fast`: the "
        "products with the matrix alone, two a block of the basis; of `exact`: a triangle of "
        "x xᵀ, and its eigenvalues without vectors. Shares of the time by torch's profiler. "
        f"{made_by('bench-profile', result['measured'], where)}\n\n"
        f"{markdown_table(*rows_of(result['cases']))}\n\n"
        f"{markdown_table(*bar_rows(result['cases']))}\n"
    )


@click.command()
@out_option("solvers")
def main(out: Path) -> None:
    """Profile `fast` on the shapes that have a bar."""
    cases = [measured(MatrixMaker(m, n).make(SPECTRUM)) for m, n in BAR_SHAPES]  # type: ignore[arg-type]
    current = conditions(("linalg",), ("torch",), threads=torch.get_num_threads())
    result = {"conditions": current, "measured": [provenance()], "cases": cases}
    write_json(out / "profile.json", result)
    (out / "profile.md").write_text(markdown(result))
    heading, rows = rows_of(cases)
    table = Table(title="Where `fast` spends its time", title_justify="left")
    for name in heading:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
