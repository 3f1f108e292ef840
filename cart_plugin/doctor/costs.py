"""The memory and disk space that a planned merge will need, against what there is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path

import torch
from mergekit.common import dtype_from_name
from mergekit.options import MergeOptions

from cart_plugin.checkpoints.files import left_bytes
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.doctor.findings import Finding, ok, problem, warning
from cart_plugin.doctor.layout import Recipe, references
from cart_plugin.doctor.machine import available_memory, size
from cart_plugin.doctor.merges import Merge
from cart_plugin.linalg.threads import SIDE_BY_SIDE, at_a_time
from cart_plugin.merging.informed import MOST_INFORMED, few_directions
from cart_plugin.merging.tensors import matrix_shape

# Python, torch, transformers and mergekit, before anything is loaded.
PROGRAM_BYTES = 450_000_000
# Upper bounds of the copies of one tensor in fp32 that a merge holds beside its inputs: measured at
# 2048x2048, 4 to 5 while few directions are kept, up to 13 (full SVD) beyond and with `energy`.
_COPIES_FEW_DIRECTIONS = 6
_FEW_DIRECTIONS = 1 / 8  # of the full rank
_COPIES_MANY_DIRECTIONS = 13
_COPIES_AVERAGED = 2
_COPIES_SYSTEM = 2  # `least_interference`: of all models' factors, and of their Gram matrix
# Of mergekit's own methods, measured with two to eight models in bf16 and fp32: `linear` 1 to 4
# copies, TIES and DARE up to three of each input and 5 more.
_OURS = ("cart", "cart_auto")
_INPUTS_OTHERS = 3
_COPIES_OTHERS = 8


def check_memory(merges: Sequence[Merge], config: Recipe) -> Iterator[Finding]:
    """Estimate the main memory that a merge with `cart` takes on the CPU: an upper bound.

    The sum of: the program; all inputs of the tensor that needs most, in the dtype they are merged
    in; its copies in fp32, six if at most an eighth of its full rank is kept, thirteen if more is
    or may be (`energy`), two if it is averaged; with `cart_auto` all models' factors, the system
    that combines them and, with a base model, one more copy or, of four models, two; and the
    finished tensors that wait until their shard of the result is full, 5 GB of them unless
    --out-shard-size is set.
    Files that the system keeps in memory because they were read are not counted: it gives that
    memory back.
    """
    merges = [merge for merge in merges if merge.inputs]
    if not merges:
        return
    largest = max(merges, key=lambda merge: peak(merge, config))
    shard = min(result_bytes(merges, config), MergeOptions().out_shard_size)
    needed = PROGRAM_BYTES + shard + peak(largest, config)
    fact = f"memory needed on the CPU: up to about {size(needed)}; most for {largest.planned.name}"
    free = available_memory()
    if free is None or needed <= free:
        yield ok(fact)
    else:
        yield warning(
            f"{fact}; but only {size(free)} is available",
            "pass --out-shard-size 1B to mergekit, or close other programs",
        )


def check_disk(
    merges: Sequence[Merge],
    checkpoints: Mapping[str, Checkpoint],
    config: Recipe,
    out: Path | None,
    *,
    fuses: bool = False,
) -> Iterator[Finding]:
    """Compare the size of the result with the room on its file system.

    Args:
        merges: the tensors of the result.
        checkpoints: the inputs by label.
        config: the recipe.
        out: folder of the result; the current one if None.
        fuses: adapters are fused without mergekit's flag, as `mergekit-cart merge` does it.
    """
    folder = (out or Path()).absolute()
    fused = [label for label, model in references(config).items() if model.lora is not None]
    if fused:
        tensors = [info for label in fused for info in checkpoints[label].tensors.values()]
        whose = "for the fused models" if fuses else "by --lora-merge-cache FOLDER"
        yield ok(f"disk needed {whose}: {size(sum(info.bytes for info in tensors))}")
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = result_bytes([merge for merge in merges if merge.inputs], config)
    there = 0 if out is None else left_bytes(out)
    needed = max(0, needed - there)
    more = f" beside the {size(there)} of an interrupted merge" if there else ""
    fact = f"disk needed: {size(needed)}{more}, free at {folder}: {size(free)}"
    checked = " (--out FOLDER checks it)" if out is None else ""
    advice = f"write to another file system{checked}, or delete something there"
    if there:
        advice = "delete something there; another folder would take all of it, from the start"
    yield ok(fact) if needed <= free else problem(fact, advice)


def peak(merge: Merge, config: Recipe) -> float:
    """Bytes of one tensor's inputs and working copies."""
    elements = next(iter(merge.inputs.values())).elements
    inputs = len(merge.inputs) * elements * merge_dtype(merge, config).itemsize
    if config.merge_method not in _OURS:
        return (1 + _INPUTS_OTHERS) * inputs + _COPIES_OTHERS * 4 * elements
    copies: float = _COPIES_AVERAGED
    if merge.is_decomposed:
        stack, m, n = matrix_shape(merge.planned.name, merge.shape)
        share = merge.rank_share
        few = share is not None and share <= _FEW_DIRECTIONS
        copies = _COPIES_FEW_DIRECTIONS if few else _COPIES_MANY_DIRECTIONS
        if config.merge_method == "cart_auto":
            rank = min(m, n) if share is None else round(share * min(m, n))
            ranks = min(n, len(merge.inputs) * rank)
            system = _COPIES_SYSTEM * (ranks * (m + n) + ranks**2)
            if merge.looks_for_low_rank:
                ranks = min(n, len(merge.inputs) * few_directions(m, n))
                system = max(system, 4 * ranks * (m + n) + 40 * ranks**2)  # `combine_factors`
            inputs += 4 * stack * system
            # The mean of what the models changed; of four both forms' results.
            if merge.takes_base or merge.looks_for_low_rank:
                copies += 2 if len(merge.counting) == MOST_INFORMED else 1
        # Small differences are decomposed side by side, and so are small matrices of a large one.
        together = at_a_time(len(merge.inputs), SIDE_BY_SIDE // max(1, elements))
        within = at_a_time(stack, SIDE_BY_SIDE // max(1, m * n))
        copies *= max(together, 1 + (within - 1) / stack)
    return inputs + copies * 4 * elements


def result_bytes(merges: Sequence[Merge], config: Recipe) -> int:
    """Bytes of the result's tensors, each of which some input holds."""
    total = 0
    for merge in merges:
        first = next(iter(merge.inputs.values()))
        dtype = dtype_from_name(config.out_dtype) or merge_dtype(merge, config)
        total += first.elements * dtype.itemsize if merge.is_floating else first.bytes
    return total


def merge_dtype(merge: Merge, config: Recipe) -> torch.dtype:
    """The dtype a tensor is merged in: the recipe's, or what the inputs promote to."""
    dtypes = [info.dtype for info in merge.inputs.values() if info.dtype is not None]
    return dtype_from_name(config.dtype) or reduce(torch.promote_types, dtypes)
