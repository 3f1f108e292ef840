"""`python -m benchmarks.auto.adapters`: models that differ from their base by low rank, as LoRA's.

The suites' encoders with their matrices' changes cut to rank 16 around the base, and nothing else
changed, on validation splits: how much of a low numerical rank `cart` has to drop
(`cart_plugin.linalg.rules.SHARE_OF_NUMERICAL_RANK`), and what `cart_auto` makes of such models.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from torch import Tensor

from benchmarks.auto.number import ARITHMETIC, FINE_TUNED, merge
from benchmarks.auto.study import EXAMPLES, SCALES, task_arithmetic
from benchmarks.common import peers
from benchmarks.common.commands import out_option, workers_option
from benchmarks.common.provenance import made_by
from benchmarks.common.record import Record, conditions
from benchmarks.common.tables import markdown_table
from benchmarks.common.training import in_processes
from benchmarks.suites import load_encoders, task_order
from cart_plugin import CartSettings, merge_state_dicts
from cart_plugin.linalg.rules import SHARE_OF_NUMERICAL_RANK, RankRule
from cart_plugin.linalg.svd import truncated_svd
from cart_plugin.merging.tensors import is_decomposed, matrix_shape

SUITES = ("vision", "text")
SEED = 0
RANK = 16
COUNTS = (3, 4, 8)
SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
PACKAGES = ("torch", "transformers")
PEERS = ("TSV-M", "ASWUDI", "SWUDI")
AUTOS = ("cart_auto", "cart_auto without the base")

Tensors = Mapping[str, Tensor]


def cut(tuned: Tensors, base: Tensors, rank: int = RANK) -> dict[str, Tensor]:
    """The base with a fine-tuned model's matrices at their nearest changes of a rank."""
    found = {}
    for name, start in base.items():
        found[name] = start
        if is_decomposed(name, start.shape):
            tau = (tuned[name] - start).reshape(matrix_shape(name, start.shape)[1:])
            change = truncated_svd(tau, RankRule(rank=rank), svd="exact")
            found[name] = start + change.dense().view(start.shape)
    return found


def share_of(share: float) -> str:
    """Names plain CART that keeps a share of the differences' numerical rank."""
    return f"cart, 1/{1 / share:.0f} of the rank"


METHODS = (
    FINE_TUNED,
    "average",
    *map(task_arithmetic, SCALES),
    *map(share_of, SHARES),
    *PEERS,
    *AUTOS,
)


def adapters(suite: str, folder: Path) -> None:
    """Judge everything on one suite; what is known is not done again."""
    known = conditions(
        ("linalg", "merging"), PACKAGES, timed=False, examples=EXAMPLES, peers=peers.REVISION
    )
    spared = {"revisions": lambda key: key not in AUTOS and not key.startswith("cart")}
    record = Record(folder / f"{suite}.json", known, spared=spared)
    wanted = [method for method in METHODS if method not in record.cases]
    if not wanted:
        return
    order = task_order(suite)
    encoders = load_encoders(suite, SEED, "validation", EXAMPLES, order)
    base = encoders.base()
    tuned = {task: cut(encoders.tuned[task], base) for task in order}
    alone: dict[str, float] = {}
    for task in order if FINE_TUNED in wanted else ():
        alone |= encoders.judge(tuned[task], [task])
    for method in wanted:
        found = {}
        for count in COUNTS:
            tasks = order[:count]
            if method == FINE_TUNED:
                found[str(count)] = {task: alone[task] for task in tasks}
            else:
                merged = merged_by(method, [tuned[task] for task in tasks], base)
                found[str(count)] = encoders.judge(merged, tasks)
        record.put(method, found)
        means = ", ".join(f"{count}: {100 * _mean(one):.1f}" for count, one in found.items())
        click.echo(f"{suite}: {means} | {method}")


def merged_by(method: str, tuned: Sequence[Tensors], base: Tensors) -> dict[str, Tensor]:
    """Merge models of low rank.

    The mean of the differences that plain CART takes is that of all models: they have T times the
    rank of one.
    """
    for share in SHARES:
        if method == share_of(share):
            rank = max(1, int(share * RANK * len(tuned)))
            return merge_state_dicts(tuned, CartSettings(rank=rank))
    for scale in SCALES:
        if method == task_arithmetic(scale):
            return merge(ARITHMETIC, tuned, base, scale)
    return merge(method, tuned, base, 1.0)


def _mean(accuracies: Mapping[str, float]) -> float:
    return statistics.fmean(accuracies.values())


def markdown(folder: Path) -> str:
    """A row a method, a column a suite and number of models."""
    paths = {suite: folder / f"{suite}.json" for suite in SUITES}
    records = {
        suite: json.loads(path.read_text()) for suite, path in paths.items() if path.exists()
    }
    columns = [(suite, str(count)) for suite in records for count in COUNTS]
    rows = []
    for method in METHODS:
        known = {suite: record["cases"].get(method) for suite, record in records.items()}
        cells = [
            f"{100 * _mean(case[count]):.1f}" if (case := known[suite]) else "-"
            for suite, count in columns
        ]
        bold = "**" if method == share_of(SHARE_OF_NUMERICAL_RANK) else ""
        rows.append([f"{bold}{method}{bold}", *cells])
    heading = ["method", *(f"{suite}, {count}" for suite, count in columns)]
    table = markdown_table(heading, rows, ["---", *["---:"] * len(columns)])
    measured = [one for record in records.values() for one in record["measured"]]
    return (
        f"Accuracy in per cent on the validation splits ({EXAMPLES} examples a task, one "
        f"fine-tuning seed) of encoders whose changes were cut to rank {RANK}, by suite and number "
        "of models. Plain `cart` with lambda 1 keeps a share of the rank of the differences from "
        "the average (16 times the number of models); bold: what it does by default. "
        f"{made_by('bench-auto', measured)}\n\n{table}\n"
    )


@click.command()
@workers_option
@out_option("auto")
@click.option("--suites", default=",".join(SUITES), show_default=True, help="Which.")
def main(workers: int, out: Path, suites: str) -> None:
    """Merge models of low rank, as adapters make them, on the validation splits."""
    folder = out / "adapters"
    in_processes([partial(adapters, suite, folder) for suite in suites.split(",")], workers)
    (out / "adapters.md").write_text(markdown(folder))
    click.echo(markdown(folder))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.auto.adapters")
