"""`python -m benchmarks.theory.subsets`: sets of models that no rule of the plugin was made by.

`benchmarks.auto.study`, by which `cart_auto` and with it the recommendation of `mergekit-cart
inspect` were chosen, looked at neighbours in the suites' order, on validation splits of the first
fine-tuning seeds. Here subsets are drawn, of other seeds, and judged on the test splits as
`benchmarks.auto.number` judges its own.
"""

from __future__ import annotations

import itertools
import os
import random
from functools import partial
from pathlib import Path

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.auto.members import Member, sets_of
from benchmarks.auto.number import number, scales_of
from benchmarks.common.commands import out_option, workers_option
from benchmarks.common.measure import RESULTS
from benchmarks.common.training import in_processes
from benchmarks.suites import task_order

SEEDS = {"vision": 2, "text": 1}
"""Of which `study` read no encoder."""
SIZES = (2, 3, 4, 6)
METHODS = (
    *("fine-tuned", "average", "cart_auto", "TSV-M", "task arithmetic", "TIES"),
    *("cart, its defaults", "SWUDI", "ACE", "cart_auto without the base"),
)


def drawn(suite: str) -> dict[str, list[tuple[Member, ...]]]:
    """Two subsets of each size, by size as in `benchmarks.auto.number`; none that it has."""
    chance = random.Random(f"held out, {suite}")
    found = {}
    for size in SIZES:
        seen = {frozenset(tasks) for tasks in sets_of(suite)[str(size)]}
        every = [
            tasks
            for tasks in itertools.combinations(task_order(suite), size)
            if frozenset(tasks) not in seen
        ]
        found[str(size)] = [tuple((0, task) for task in tasks) for tasks in chance.sample(every, 2)]
    return found


@click.command()
@workers_option
@out_option("theory")
@click.option("--suites", default=",".join(SEEDS), show_default=True, help="Which.")
def main(workers: int, out: Path, suites: str) -> None:
    """Merge the subsets that were drawn by data-free methods, and judge them."""
    todo = [
        partial(
            number,
            suite,
            SEEDS[suite],
            scales_of(suite, RESULTS / "auto"),
            out / "subsets",
            drawn(suite),
            METHODS,
        )
        for suite in suites.split(",")
    ]
    in_processes(todo, workers)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.theory.subsets")
