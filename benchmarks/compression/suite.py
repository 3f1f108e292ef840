"""`python -m benchmarks.compression` (`make bench-compress`): accuracy against bytes.

The vision and the text suite, eight tasks each: every task's encoder as it comes back from
`mergekit-cart compress`, around the average and around the pretrained encoder, from
`mergekit-extract-lora`, from rounding, and from FusionBench's EMR and TALL masks. All on the test
split; nothing is chosen but the scale of the TALL masks, on each seed's validation split. What
`compress` costs beside `mergekit-extract-lora` is `benchmarks.compression.speed`'s to say.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local folders
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from benchmarks.common.commands import out_option, report_option, workers_option
from benchmarks.common.record import COMPRESSES, Record, conditions
from benchmarks.common.training import in_processes
from benchmarks.compression import methods
from benchmarks.compression.methods import Stored
from benchmarks.compression.report import write_report
from benchmarks.suites import Encoders, load_encoders, task_order
from cart_plugin.errors import CartError

SUITES = ("vision", "text")
SEEDS = (0, 1, 2)
VALIDATION, TEST = 100, 500  # examples a task
PACKAGES = ("fusion-bench", "mergekit", "peft", "torch", "transformers")

# 1, 2, 4, 6, 8, 12 and 16 % of 384, the short side of all matrices of both suites.
RANKS = (4, 8, 15, 23, 31, 46, 61)
RANK = 23
SIZES = (0.15, 0.17, 0.20, 0.22, 0.25, 0.30)
HALF_SIZES = (0.08, 0.10, 0.13, 0.17, 0.22)
# Leaves position tables, word embeddings, norms and biases at the base: none of the suites' moved
# further than 7 % of its norm.
SMALL = 0.1
EXTRACTED = (8, 23, 46)  # it takes minutes a rank
SCALES = (0.2, 0.3, 0.4, 0.5, 0.6)
SAME_SIZE = f"compress, target size of rank {RANK}"
TALL = "TALL masks"

Make = Callable[[Encoders, Path], Stored]


def cases(curves: bool) -> dict[str, Make]:
    """All ways to store the encoders, by name.

    Args:
        curves: with those that only the plot needs.
    """
    ranks = RANKS if curves else (RANK,)
    found: dict[str, Make] = {
        "fine-tuned": lambda encoders, _: methods.whole(encoders),
        "average": lambda encoders, _: methods.averaged(encoders),
        f"compress, rank {RANK}, all else exact": partial(methods.indexed, rank=RANK),
    }
    for rank in ranks:
        found[f"compress, rank {rank}"] = _indexed(rank=rank)
    for size in SIZES if curves else (0.17, 0.22):
        found[f"compress, target size {size:.0%}"] = _indexed(target_size=size)
    for size in HALF_SIZES if curves else (0.17,):
        found[f"compress, bf16, target size {size:.0%}"] = _indexed(
            target_size=size, dtype="bfloat16"
        )
    found[f"compress, bf16, rank {RANK}"] = _indexed(rank=RANK, dtype="bfloat16")
    for rank in ranks:
        found[f"around the pretrained, rank {rank}"] = _indexed(rank=rank, around_base=True)
    for rank in EXTRACTED if curves else (RANK,):
        found[f"extract-lora, rank {rank}"] = partial(methods.extracted, rank=rank)
    found[f"extract-lora, rank {RANK}, matrices only"] = partial(
        methods.extracted, rank=RANK, matrices_only=True
    )
    for bits in (8, 4):
        found[f"{bits}-bit rounding"] = partial(_rounded, bits)
    found["EMR"] = lambda encoders, _: methods.emr(encoders)
    return found


def _indexed(**options: Any) -> Make:
    return partial(methods.indexed, small_error=SMALL, **options)


def _rounded(bits: int, encoders: Encoders, _: Path) -> Stored:
    return methods.rounded(encoders, bits)


def judge_all(suite: str, seed: int, curves: bool, folder: Path) -> None:
    """Judge all ways on one suite and seed; what is known is not done again."""
    own = {"methods": methods.REVISION, "examples": TEST}
    known = conditions(COMPRESSES, PACKAGES, timed=False, **own)
    record = Record(folder / f"{suite}-{seed}.json", known)
    known_cases = {name for name, case in record.cases.items() if "error" not in case}
    todo = {name: make for name, make in cases(curves).items() if name not in known_cases}
    if not todo and {SAME_SIZE, TALL} <= known_cases:
        return
    tasks = task_order(suite)
    encoders = load_encoders(suite, seed, "test", TEST, tasks)

    def put(name: str, stored: Stored, **more: Any) -> None:
        found = {**judged(encoders, stored), **more}
        record.put(name, found)
        mean = 100 * statistics.fmean(found["accuracy"].values())
        click.echo(f"{suite} {seed}: {mean:5.1f} at {100 * found['share']:5.1f} % {name}")

    for name, make in todo.items():
        with tempfile.TemporaryDirectory() as work:
            try:
                put(name, make(encoders, Path(work) / "stored"))
            except (RuntimeError, CartError) as error:
                record.put(name, {"error": str(error)})
                click.echo(f"{suite} {seed}: {name}: {error}")
    if SAME_SIZE not in record.cases:
        # What one threshold for all gains over one rank for all, to the byte.
        same = _indexed(target_size=record.cases[f"compress, rank {RANK}"]["share"])
        with tempfile.TemporaryDirectory() as work:
            put(SAME_SIZE, same(encoders, Path(work) / "stored"))
    if "peft" not in record.cases and curves:
        with tempfile.TemporaryDirectory() as work:
            served = Path(work) / "served"
            methods.indexed(encoders, served, rank=RANK)
            record.put("peft", methods.peft_differences(served, task_order(suite)))
    if TALL not in record.cases:
        judges = load_encoders(suite, seed, "validation", VALIDATION, tasks)
        with contextlib.redirect_stdout(io.StringIO()):  # FusionBench tells each mask
            scales = best_scales(judges)
            put(TALL, methods.tall_masks(encoders, scales), scales=scales)


def best_scales(encoders: Encoders) -> dict[str, float]:
    """Each task's scale of its TALL mask, by the accuracy of what comes back."""
    found: dict[str, dict[float, float]] = {task: {} for task in encoders.tuned}
    for scale in SCALES:
        stored = methods.tall_masks(encoders, dict.fromkeys(encoders.tuned, scale))
        for task, by_scale in found.items():
            by_scale[scale] = encoders.judge(stored.restored(task), [task])[task]
    return {task: max(SCALES, key=by_scale.__getitem__) for task, by_scale in found.items()}


def judged(encoders: Encoders, stored: Stored) -> dict[str, Any]:
    """Accuracy of each task's own encoder, what all of them take, and their squared error."""
    accuracy: dict[str, float] = {}
    squared = 0.0
    for task, tensors in encoders.tuned.items():
        restored = stored.restored(task)
        accuracy |= encoders.judge(restored, [task])
        for name, tensor in tensors.items():
            difference = restored[name].to(torch.float32) - tensor
            squared += float(difference.double().square().sum())
    share = stored.bytes / methods.models_bytes(encoders)
    return {"accuracy": accuracy, "bytes": stored.bytes, "share": share, "squared_error": squared}


@click.command()
@workers_option
@report_option
@out_option("compression")
def main(workers: int, only_report: bool, out: Path) -> None:
    """Accuracy against bytes of compressed encoders."""
    if not only_report:
        jobs = [
            partial(judge_all, suite, seed, seed == 0, out) for seed in SEEDS for suite in SUITES
        ]
        in_processes(jobs, workers)
    click.echo(write_report(out, SUITES, SEEDS))
