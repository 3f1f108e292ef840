"""The small dense problems inside the solvers, on the GPU and on the CPU with both transfers.

The solvers hand them to the device of their input. Where the CPU is faster in spite of the way
there and back, they would be better off there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import torch
from torch import Tensor

from benchmarks.common.cache import write_json
from benchmarks.common.gpu import card, gpu_results
from benchmarks.common.provenance import made_by, provenance
from benchmarks.common.tables import markdown_table
from cart_plugin.linalg.gram import eigh
from cart_plugin.linalg.krylov import orthonormal

SIZES = (64, 128, 256, 512, 1024, 2048)
RUNS = 5
_WIDE = 4096


def _problems(size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(size, _WIDE, generator=generator).to(device)
    gram = rows @ rows.mT
    none = rows[:0]

    def away(function: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
        def run() -> object:
            found = function(x.cpu())
            parts = found if isinstance(found, tuple) else (found,)
            return [part.to(device) for part in parts]

        return run

    return {
        "eigh, GPU": lambda: eigh(gram),
        "eigh, CPU": away(eigh, gram),
        "Cholesky QR, GPU": lambda: orthonormal(rows, none),
        "Cholesky QR, CPU": away(lambda x: orthonormal(x, x[:0]), rows),
        "torch.linalg.qr, GPU": lambda: torch.linalg.qr(rows.mT),
    }


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """The median of a few runs, after one to warm up."""
    times = []
    for _ in range(RUNS + 1):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        function()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


@click.command()
def main() -> None:
    """Measure; results go to the card's folder, after each size."""
    name, out, device = card(), gpu_results(), torch.device("cuda", 0)
    found: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for size in SIZES:
            problems = _problems(size, device)
            found[str(size)] = {
                label: seconds(function, device) for label, function in problems.items()
            }
            result = {"gpu": name, "measured": [provenance()], "seconds": found}
            write_json(out / "small.json", result)
            heading = ["size", *(f"{label}, ms" for label in problems)]
            rows = [
                [size_, *(f"{value * 1e3:.2f}" for value in row.values())]
                for size_, row in found.items()
            ]
            made = made_by("bench-gpu", [provenance()], f"on {name}")
            table = markdown_table(heading, rows, ["---:"] * len(heading))
            caption = f"{made} In fp32; QR of rows of {_WIDE}."
            (out / "small.md").write_text(f"{caption}\n\n{table}\n")
    click.echo((out / "small.md").read_text())


if __name__ == "__main__":
    main()
