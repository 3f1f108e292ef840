"""What merging eight 70B models would take, on paper: `python -m benchmarks.speed.estimate`.

From the measured rate of the `fast` solver (`make bench-solvers`) and a supposed network. Nothing
of this size has been merged here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from benchmarks.common.commands import publish
from benchmarks.common.measure import RESULTS
from benchmarks.common.tables import markdown_table

MODELS = 8
RATIO = 0.08
# Llama 3 70B: matrices of a layer with how many there are, layers, parameters of all.
MATRICES = {(8192, 8192): 2, (1024, 8192): 2, (28672, 8192): 3}
LAYERS = 80
PARAMETERS = 70.6e9
NODES = (1, 4, 16)
CORES = 64  # of a node
NETWORK = 1.25e9  # bytes a second to a node: 10 Gb/s
STORAGE = 5e9  # bytes a second that the shared file system gives all nodes together


def core_seconds(solvers: Mapping[str, Any], cores: int) -> float:
    """Seconds of one core for all decompositions, from the largest matrices that were measured.

    Args:
        solvers: `cases` of the solvers' results.
        cores: that they were measured on.
    """
    rates = [
        case["solvers"]["fast"]["seconds"] / _work(*case["shape"])
        for case in solvers.values()
        if case["ratio"] == RATIO and min(case["shape"]) >= 2048
    ]
    work = sum(count * _work(*shape) for shape, count in MATRICES.items())
    return max(rates) * cores * work * LAYERS * MODELS


def _work(m: int, n: int) -> float:
    """What the solver's time grows with: entries times directions."""
    return m * n * RATIO * min(m, n)


def rows(seconds: float) -> list[list[str]]:
    """A row for each number of nodes: minutes of products, of transfers, and of the merge."""
    size = 2 * PARAMETERS * (MODELS + 1)
    found = []
    for nodes in NODES:
        products = seconds / (nodes * CORES) / 60
        transfers = size / min(nodes * NETWORK, STORAGE) / 60
        longer = max(products, transfers)
        found.append([str(nodes), *(f"{it:.0f}" for it in (products, transfers, longer))])
    return found


def markdown(seconds: float, table: Sequence[Sequence[str]]) -> str:
    """The estimate with its assumptions."""
    heading = ["nodes", "products, min", "reading and writing, min", "the longer of both, min"]
    return (
        f"On paper, not measured: `cart` of {MODELS} models of 70.6 B parameters in bf16 (Llama 3 "
        f"70B), rank ratio {RATIO}, nodes of {CORES} cores, {NETWORK / 1e9:g} GB/s to each node "
        f"and {STORAGE / 1e9:g} GB/s from the storage to all. All inputs are read once and the "
        f"result is written once, {2 * PARAMETERS * (MODELS + 1) / 1e12:.2f} TB, while others are "
        f"decomposed. The products take {seconds / 3600:.0f} hours of one core, at the lowest rate "
        "that `fast` has on matrices of 2048 and more rows in `make bench-solvers`; that cores "
        "side by side are as fast as two is an assumption, too.\n\n"
        f"{markdown_table(heading, table, ['---:'] * 4)}\n"
    )


def main() -> None:
    """Write and print the estimate."""
    solvers = json.loads((RESULTS / "solvers" / "results.json").read_text())
    seconds = core_seconds(solvers["cases"], cores=solvers["conditions"]["threads"])
    publish(markdown(seconds, rows(seconds)), RESULTS / "speed" / "estimate.md", Console())


if __name__ == "__main__":
    main()
