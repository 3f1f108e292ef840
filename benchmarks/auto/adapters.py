"""`python -m benchmarks.auto.adapters`: models that differ from their base by low rank, as LoRA's.

The suites' encoders with their matrices' changes cut to rank 16 around the base, and nothing else
changed, on validation splits: how much of a low numerical rank `cart` has to drop
(`cart_plugin.linalg.rules.SHARE_OF_NUMERICAL_RANK`), and what `cart_auto` makes of such models.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from torch import Tensor

from benchmarks.auto.number import ARITHMETIC, FINE_TUNED, merge
from benchmarks.auto.study import EXAMPLES, SCALES, open_record, task_arithmetic
from benchmarks.common.commands import out_option, workers_option
from benchmarks.common.provenance import made_by
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


def _by_cart(share: float, tuned: Sequence[Tensors], _: Tensors) -> dict[str, Tensor]:
    # Its differences are from the mean of all T models: they have T times the rank of one.
    rank = max(1, int(share * RANK * len(tuned)))
    return merge_state_dicts(tuned, CartSettings(rank=rank))


def _by_arithmetic(scale: float, tuned: Sequence[Tensors], base: Tensors) -> dict[str, Tensor]:
    return merge(ARITHMETIC, tuned, base, scale)


def _by(method: str, tuned: Sequence[Tensors], base: Tensors) -> dict[str, Tensor]:
    return merge(method, tuned, base, 1.0)  # the scale is task arithmetic's


Way = Callable[[Sequence[Tensors], Tensors], dict[str, Tensor]]
OF_CART: dict[str, Way] = {share_of(share): partial(_by_cart, share) for share in SHARES}
WAYS: dict[str, Way] = {
    "average": partial(_by, "average"),
    **{task_arithmetic(scale): partial(_by_arithmetic, scale) for scale in SCALES},
    **OF_CART,
    **{method: partial(_by, method) for method in (*PEERS, *AUTOS)},
}
METHODS = (FINE_TUNED, *WAYS)


def adapters(suite: str, folder: Path) -> None:
    """Judge everything on one suite; what is known is not done again."""
    spared = {"revisions": lambda key: key not in AUTOS and key not in OF_CART}
    known = {"examples": EXAMPLES}
    record = open_record(folder / f"{suite}.json", PACKAGES, spared, known)
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
                merged = WAYS[method]([tuned[task] for task in tasks], base)
                found[str(count)] = encoders.judge(merged, tasks)
        record.put(method, found)
        means = ", ".join(f"{count}: {100 * _mean(one):.1f}" for count, one in found.items())
        click.echo(f"{suite}: {means} | {method}")


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
