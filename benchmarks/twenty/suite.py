"""Twenty image encoders: CART's accuracy by rank, and every data-free method's by how many merge.

Ranks and lambdas are judged on the validation split, around the average (CART) and around the base
(low-rank task vectors), for the paper's 8, 14 and 20 tasks. With the best of them, everything else
is judged on the test split, for 2 to 20 tasks in one order.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.auto.number import ARITHMETIC, FINE_TUNED, OF_MODELS, merge
from benchmarks.auto.study import open_record
from benchmarks.common.data_free import OF_TAUS, Tensors
from benchmarks.common.record import Record, conditions
from benchmarks.suites import Encoders, load_encoders
from benchmarks.vision.tasks import SUITE, TASKS
from cart_plugin import CartSettings, merge_state_dicts
from cart_plugin.linalg.rules import RankRule
from cart_plugin.linalg.svd import truncated_svd
from cart_plugin.merging.tensors import is_decomposed, matrix_shape

ORDER = (*SUITE, *(name for name in TASKS if name not in SUITE))
TUNED_COUNTS = (8, 14, 20)  # the paper's
COUNTS = (2, 4, 6, 8, 11, 14, 17, 20)
EXAMPLES = {"validation": 50, "test": 150}  # a task
PACKAGES = ("torch", "transformers", "mergekit", "fusion-bench")

SHARES = (0.01, 0.02, 0.04, 0.08, 0.12, 0.16, 0.24, 0.32, 0.48, 0.64, 1.0)  # of the full rank
AVERAGE, BASE = "average", "base"
LAMBDAS = {AVERAGE: (1.0, 1.5, 2.0, 3.0, 4.0), BASE: (0.1, 0.2, 0.3, 0.5, 1.0)}

TUNED = "cart, tuned"
METHODS = (FINE_TUNED, "average", *OF_MODELS, TUNED, ARITHMETIC, *OF_TAUS)


def rank_key(count: int, centre: str, share: float) -> str:
    """Of a case of `ranks`."""
    return f"{count} around the {centre}, {share:g}"


def ranks(seed: int, folder: Path) -> None:
    """Judge all ranks and lambdas on the validation split; what is known is not done again.

    A case is the mean accuracy by lambda.
    """
    known = conditions(
        ("linalg",), PACKAGES[:2], timed=False, examples=EXAMPLES["validation"], order=ORDER
    )
    record = Record(folder / f"ranks-{seed}.json", known)
    wanted = [
        (count, centre)
        for count in TUNED_COUNTS
        for centre in LAMBDAS
        if any(rank_key(count, centre, share) not in record.cases for share in SHARES)
    ]
    if not wanted:
        return
    held = load_encoders("vision", seed, "validation", EXAMPLES["validation"], ORDER)
    base = held.base()
    for count, centre in wanted:
        tasks = ORDER[:count]
        tuned = [held.tuned[task] for task in tasks]
        average = merge("average", tuned, base, 1.0)
        start = average if centre == AVERAGE else base
        for share, sums in _by_share(tuned, average, start):
            found = {
                f"{scale:g}": _mean(held, _added(average, start, sums, scale), tasks)
                for scale in LAMBDAS[centre]
            }
            record.put(rank_key(count, centre, share), found)
            text = ", ".join(f"{scale}: {100 * one:.1f}" for scale, one in found.items())
            click.echo(f"seed {seed}, {rank_key(count, centre, share)}: {text}")


def _by_share(
    tuned: Sequence[Tensors], average: Tensors, start: Tensors
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """For each share of the full rank, the sum of the truncated differences from `start`."""
    sums: dict[float, dict[str, Tensor]] = {share: {} for share in SHARES}
    for name, centre in average.items():
        if not is_decomposed(name, centre.shape):
            continue
        stack, m, n = matrix_shape(name, centre.shape)
        if stack != 1:
            raise ValueError(f"{name} is a stack of matrices, which the suite has none of")
        factors = [
            truncated_svd((one[name] - start[name]).reshape(m, n), RankRule(1.0), svd="exact")
            for one in tuned
        ]
        for share in SHARES:
            k = RankRule(share).fixed_rank(m, n)
            left = torch.cat([one.U[:, :k] * one.S[:k] for one in factors], dim=1)
            right = torch.cat([one.Vh[:k] for one in factors])
            sums[share][name] = (left @ right).view(centre.shape)
    yield from sums.items()


def _added(average: Tensors, start: Tensors, sums: Tensors, scale: float) -> dict[str, Tensor]:
    """A centre and a multiple of what is kept; what is not decomposed is averaged."""
    return {
        name: start[name] + scale * sums[name] if name in sums else mean
        for name, mean in average.items()
    }


def _mean(held: Encoders, tensors: Tensors, tasks: Sequence[str]) -> float:
    return statistics.fmean(held.judge(tensors, tasks).values())


def best(cases: Mapping[str, Any], count: int, centre: str) -> tuple[float, float, float]:
    """The rank's share and lambda that did best for a number of tasks, and the accuracy."""
    accuracy, share, scale = max(
        (accuracy, -share, -float(scale))  # of equal ones, the smaller
        for share in SHARES
        for scale, accuracy in cases[rank_key(count, centre, share)].items()
    )
    return -share, -scale, accuracy


def tuned_count(count: int) -> int:
    """The number of tasks whose settings are taken for a number: the next of the paper's."""
    return next(one for one in TUNED_COUNTS if one >= count)


def settings_of(cases: Mapping[str, Any], count: int) -> tuple[CartSettings, float]:
    """CART's settings and the scale of task arithmetic for a number of tasks."""
    near = tuned_count(count)
    share, scale, _ = best(cases, near, AVERAGE)
    whole = cases[rank_key(near, BASE, 1.0)]
    arithmetic = max(whole, key=lambda one: whole[one])
    return CartSettings(rank_ratio=share, lambda_=scale), float(arithmetic)


def number(seed: int, chosen: Mapping[str, Any], folder: Path) -> None:
    """Judge every method for every number of tasks on the test split; known ones are not redone.

    A case is the accuracies by task, by number of tasks.

    Args:
        seed: of the fine-tuning.
        chosen: the cases of `ranks` of the first seed.
        folder: of the records.
    """
    settings = {count: settings_of(chosen, count) for count in COUNTS}
    known = {
        "examples": EXAMPLES["test"],
        "order": ORDER,
        "tuned": {
            str(count): [cart.rank_ratio, cart.lambda_, scale]
            for count, (cart, scale) in settings.items()
        },
    }
    spared = {
        "revisions": lambda key: key not in (*OF_MODELS, TUNED),
        "tuned": lambda key: key not in (TUNED, ARITHMETIC),
    }
    record = open_record(folder / f"number-{seed}.json", PACKAGES, spared, known)
    wanted = [method for method in METHODS if method not in record.cases]
    if not wanted:
        return
    held = load_encoders("vision", seed, "test", EXAMPLES["test"], ORDER)
    base = held.base()
    for method in wanted:
        started = time.perf_counter()
        found: dict[str, dict[str, float]] = {}
        alone: dict[str, float] = {}
        for count in COUNTS:
            tasks = ORDER[:count]
            if method == FINE_TUNED:
                for task in tasks:
                    if task not in alone:
                        alone |= held.judge(held.tuned[task], [task])
                found[str(count)] = {task: alone[task] for task in tasks}
                continue
            cart, scale = settings[count]
            tuned = [held.tuned[task] for task in tasks]
            if method == TUNED:
                merged = merge_state_dicts(tuned, cart)
            else:
                merged = merge(method, tuned, base, scale)
            found[str(count)] = held.judge(merged, tasks)
        record.put(method, found)
        means = ", ".join(
            f"{count}: {100 * statistics.fmean(one.values()):.1f}" for count, one in found.items()
        )
        seconds = time.perf_counter() - started
        click.echo(f"seed {seed}: {means} | {method} ({seconds:.0f} s)")
