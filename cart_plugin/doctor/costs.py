"""The memory and disk space that a planned merge will need, against what there is."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path

import torch
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from cart_plugin.checkpoints.files import left_bytes
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.doctor import adapters
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
_COPIES_FUSED = 4  # of the largest weight that PEFT adds an adapter to: measured, 3 and 4 in bf16
_SMALL_SHARD = 1_000_000_000  # smaller ones free little more
# Of mergekit's own methods, measured with two to eight models in bf16 and fp32: `linear` 1 to 4
# copies, TIES and DARE up to three of each input and 5 more.
_OURS = ("cart", "cart_auto")
_INPUTS_OTHERS = 3
_COPIES_OTHERS = 8


def check_memory(
    merges: Sequence[Merge],
    checkpoints: Mapping[str, Checkpoint],
    config: Recipe,
    options: MergeOptions | None = None,
) -> Iterator[Finding]:
    """Estimate the main memory that a merge with `cart` takes on the CPU: an upper bound.

    The sum of: the program; all inputs of the tensor that needs most, in the dtype they are merged
    in, twice if their rows are put in the order of another tokenizer; its copies in fp32, six if
    at most an eighth of its full rank is kept, thirteen if more is or may be (`energy`), two if it
    is averaged; with `cart_auto` all models' factors, the system that combines them and, with a
    base model, one more copy or, of four models, two; and the finished tensors that wait until
    their shard of the result is full, 5 GB of them unless --out-shard-size is set.
    Before that, of an input that is a model and an adapter, the whole model with the program.
    Files that the system keeps in memory because they were read are not counted: it gives that
    memory back.

    Args:
        merges: the tensors of the result.
        checkpoints: the inputs by label.
        config: the recipe.
        options: mergekit's; its defaults if None.
    """
    merges = [merge for merge in merges if merge.inputs]
    if not merges:
        return
    options = options or MergeOptions()
    largest = max(merges, key=lambda merge: peak(merge, config))
    result = result_bytes(merges, config)
    merging = min(result, options.out_shard_size) + peak(largest, config)
    fused = _fusing(checkpoints, config, options)
    fusing = max(fused.values(), default=0)
    what = largest.planned.name
    if fusing > merging:
        label = max(fused, key=lambda label: fused[label])
        what = f"fusing {label}, whose base is held whole"
    needed = PROGRAM_BYTES + max(merging, fusing)
    fact = f"memory needed on the CPU: up to about {size(needed)}; most for {what}"
    free = available_memory()
    if free is None or needed <= free:
        yield ok(fact)
        return
    advice = "close other programs"
    if fusing > merging:
        advice = f"{advice}, or fuse the adapters on a larger machine (PEFT: merge_and_unload)"
    elif min(result, options.out_shard_size) > _SMALL_SHARD:
        advice = f"pass --out-shard-size 1B to mergekit, or {advice}"
    yield warning(f"{fact}; but only {size(free)} is available", advice)


def check_disk(
    merges: Sequence[Merge],
    checkpoints: Mapping[str, Checkpoint],
    config: Recipe,
    out: Path | None,
    options: MergeOptions | None = None,
) -> Iterator[Finding]:
    """Compare the sizes of the result, and of models that are fused for it, with the room for them.

    Args:
        merges: the tensors of the result.
        checkpoints: the inputs by label.
        config: the recipe.
        out: folder of the result; the current one if None.
        options: of `mergekit-cart merge`, which fuses adapters beside the result unless a cache is
            named; None for mergekit's own commands, which get the cache by a flag.
    """
    folder = _existing(out or Path())
    free = shutil.disk_usage(folder).free
    there = 0 if out is None else left_bytes(out)
    needed = result_bytes([merge for merge in merges if merge.inputs], config)
    fused = sum(_fused(checkpoints, config, options or MergeOptions()).values())
    cache = None if options is None else options.lora_merge_cache
    beside = options is not None and not cache  # the result, until it is whole
    if fused:
        whose = "for the fused models" if options else "by --lora-merge-cache FOLDER"
        yield ok(f"disk needed {whose}: {size(fused)}")
    needed = max(0, needed + (fused if beside else 0) - there)
    more = ", the fused models among it" if fused and beside else ""
    more += f" beside the {size(there)} of an interrupted merge" if there else ""
    fact = f"disk needed: {size(needed)}{more}, free at {folder}: {size(free)}"
    checked = " (--out FOLDER checks it)" if out is None else ""
    advice = f"write to another file system{checked}, or delete something there"
    if there:
        advice = "delete something there; another folder would take all of it, from the start"
    yield ok(fact) if needed <= free else problem(fact, advice)
    if fused and not beside and needed <= free:
        yield from _check_cache(fused, needed, folder, free, cache)


def _check_cache(
    fused: int, needed: int, folder: Path, free: int, cache: str | None
) -> Iterator[Finding]:
    """Warn where a cache has no room for the fused models, some of which it may hold already.

    Args:
        fused: their bytes.
        needed: the result's.
        folder: where that goes.
        free: the room there.
        cache: a folder; None for one that is not known.
    """
    place = folder if cache is None else _existing(Path(cache))
    if place.stat().st_dev == folder.stat().st_dev:
        needed, where = needed + fused, f"the result and the fused models, free at {folder}"
    else:
        needed, free = fused, shutil.disk_usage(place).free
        where = f"the fused models, free at {place}"
    if needed > free:
        yield warning(
            f"disk needed: {size(needed)} for {where}: {size(free)}",
            "let --lora-merge-cache be on another file system, or delete something there; fused "
            "models that are in it already take no more",
        )


def _existing(folder: Path) -> Path:
    """A folder, or the one above it that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _fused(
    checkpoints: Mapping[str, Checkpoint], config: Recipe, options: MergeOptions
) -> dict[str, int]:
    """Bytes of the whole models of the inputs with adapters, by label."""
    dtype = None
    with contextlib.suppress(RuntimeError):  # the merge refuses such names
        dtype = dtype_from_name(options.lora_merge_dtype)
    return {
        label: fused_bytes(checkpoints[label], dtype)
        for label, model in references(config).items()
        if model.lora is not None
    }


def _fusing(
    checkpoints: Mapping[str, Checkpoint], config: Recipe, options: MergeOptions
) -> dict[str, int]:
    """Bytes that PEFT holds of such an input: the base, its adapter, and copies of one weight."""
    needed = _fused(checkpoints, config, options)
    for label in needed:
        lora, held = references(config)[label].lora, checkpoints[label].tensors
        changed = adapters.ranks(Path(lora.path)).keys() & held.keys()
        largest = max((held[name].elements for name in changed), default=0)
        needed[label] += _COPIES_FUSED * 4 * largest
    return needed


def fused_bytes(base: Checkpoint, dtype: torch.dtype | None) -> int:
    """Bytes of a base with an adapter in it: as it is stored, or in a dtype."""
    return sum(
        info.elements * dtype.itemsize if dtype is not None and info.is_floating else info.bytes
        for info in base.tensors.values()
    )


def peak(merge: Merge, config: Recipe) -> float:
    """Bytes of one tensor's inputs and working copies."""
    elements = max(info.elements for info in merge.inputs.values())
    inputs = len(merge.inputs) * elements * merge_dtype(merge, config).itemsize
    is_ours = config.merge_method in _OURS
    sets = 1 if is_ours else 1 + _INPUTS_OTHERS
    if merge.planned.vocabulary_axis is not None and _makes_tokenizer(config):
        sets += 1  # as they are, and in the order of its tokens
    inputs *= sets
    if not is_ours:
        return inputs + _COPIES_OTHERS * 4 * elements
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


def _makes_tokenizer(config: Recipe) -> bool:
    return isinstance(config, MergeConfiguration) and bool(
        config.tokenizer or config.tokenizer_source
    )


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
