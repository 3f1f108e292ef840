"""Checks of what a planned merge would do to values without a word: lose or cast them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration

from cart_plugin.checkpoints import agreement
from cart_plugin.checkpoints.headers import StoredTensor, TensorInfo
from cart_plugin.checkpoints.placement import computed
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.doctor.advice import in_one_format
from cart_plugin.doctor.findings import Finding, problem, warning
from cart_plugin.doctor.layout import Recipe
from cart_plugin.doctor.planning import PlannedTensor
from cart_plugin.wording import count, some


class Merge(Protocol):
    """What is looked at here of `merges.Merge`."""

    @property
    def planned(self) -> PlannedTensor:
        """The planned tensor."""

    @property
    def inputs(self) -> Mapping[str, TensorInfo]:
        """What the inputs hold for it."""

    @property
    def is_floating(self) -> bool:
        """Whether it is merged."""


def check_contributors(
    merges: Sequence[Merge], checkpoints: Mapping[str, Checkpoint], config: Recipe
) -> Iterator[Finding]:
    """Report models that the names of the plan pass by: the plan is the base model's, or a part.

    Fewer than two fine-tuned models hold most of the planned tensors that any input holds.
    """
    planned: dict[str, int] = {}
    held: dict[str, int] = {}
    for merge in merges:
        for label in merge.planned.sources:
            planned[label] = planned.get(label, 0) + 1
            held[label] = held.get(label, 0) + (label in merge.inputs)
    bases = {merge.planned.base for merge in merges}
    tuned = [label for label in planned if label not in bases]
    strangers = [label for label in tuned if 2 * held[label] < planned[label]]
    if not strangers or len(tuned) - len(strangers) >= min(2, len(tuned)):
        return
    namer = next(label for label in planned if 2 * held[label] >= planned[label])
    first = strangers[0]
    lacking = next(merge.planned for merge in merges if first not in merge.inputs)
    example = (lacking.sources[first][0], next(iter(checkpoints[first].tensors)))
    fact, advice = agreement.stranger_fact(namer, strangers, example, is_base=namer in bases)
    by_format = in_one_format(config, checkpoints)
    yield problem(fact, by_format or advice, of_architecture=bool(by_format))


def check_casts(
    merges: Sequence[Merge], checkpoints: Mapping[str, Checkpoint], config: Recipe
) -> Iterator[Finding]:
    """Report casts outside the methods' sight: of integers before, to float16 after the merge."""
    yield from check_range(merges, checkpoints, config)
    dtype = config.dtype or config.out_dtype
    whole = [merge.planned.name for merge in merges if not merge.is_floating]
    if whole and dtype and isinstance(config, MergeConfiguration):
        yield warning(
            f"mergekit casts {count(len(whole), 'integer tensor')} ({some(whole)}) to {dtype}, "
            "which does not hold all integers",
            "leave dtype and out_dtype out, so that they are copied",
        )


# A merged value may be larger than those it was merged from: a sum of differences, or a `lambda`.
_MARGIN = 16
_HALF = torch.finfo(torch.float16).max


def check_range(
    merges: Sequence[Merge], checkpoints: Mapping[str, Checkpoint], config: Recipe
) -> Iterator[Finding]:
    """Report values that would be saved as infinite.

    mergekit casts a finished tensor to `out_dtype` when it writes it, so that no method can check
    it, and the inputs to `dtype` when it reads them, which only ours look at: the inputs' values
    are read for that, and the written file by `mergekit-cart merge`.
    """
    if _dtype(config.dtype) is torch.float16:
        wide = [
            label
            for label, checkpoint in checkpoints.items()
            if any(_is_wide(info) for info in checkpoint.tensors.values())
        ]
        largest, where, _ = _largest({label: checkpoints[label] for label in wide}, _is_wide)
        if largest > _HALF:
            yield _beyond("dtype", largest, where)
        return
    if _dtype(config.out_dtype) is not torch.float16:
        return
    stored = (info for merge in merges if merge.is_floating for info in merge.inputs.values())
    if _dtype(config.dtype) is None and not any(map(_is_wide, stored)):
        return
    largest, where, unread = _largest(checkpoints, lambda info: info.is_floating)
    if largest > _HALF:
        yield _beyond("out_dtype", largest, where)
    elif unread or largest > _HALF / _MARGIN:
        known = f"not known of {unread[0]}" if unread else f"up to {largest:,.0f} in {where}"
        way = "merge with `mergekit-cart merge RECIPE OUT`, which looks"
        if config.merge_method.startswith("cart"):
            way = "write `dtype: float16` instead (cart computes in float32 all the same, and looks"
            way += " itself)"
        yield warning(
            f"out_dtype: merged values beyond {_HALF:,.0f} would be saved as infinite, and "
            f"mergekit does not look; the inputs' are {known}",
            f"{way}; or write out_dtype: bfloat16",
        )


def _beyond(key: str, largest: float, where: str) -> Finding:
    return problem(
        f"{key}: {where} holds values up to {largest:,.0f}; beyond {_HALF:,.0f} they would be "
        "saved as infinite, and mergekit does not look",
        f"write `{key}: bfloat16`, or float32",
    )


def _largest(
    checkpoints: Mapping[str, Checkpoint], matters: Callable[[TensorInfo], bool]
) -> tuple[float, str, list[str]]:
    """The largest value of some weights, where it is, and the models that cannot be looked at."""
    largest, where = 0.0, ""
    unread = []
    for label, checkpoint in checkpoints.items():
        masks = set(computed(checkpoint))
        names = [name for name, info in checkpoint.tensors.items() if matters(info)]
        read = _reader(checkpoint)
        if read is None:
            unread.append(label)
            continue
        for name in names:
            if name in masks or not checkpoint.tensors[name].elements:
                continue
            found = float(read(name).float().abs().amax())
            if found > largest:
                largest, where = found, f"{name} of {label}"
    return largest, where, unread


def _reader(checkpoint: Checkpoint) -> Callable[[str], torch.Tensor] | None:
    """What reads a tensor of a model; None for pickles that only can be loaded whole."""
    if all(isinstance(info, StoredTensor) for info in checkpoint.tensors.values()):
        return checkpoint.read
    if not all(zipfile.is_zipfile(file) for file in checkpoint.files):
        return None
    held: dict[str, torch.Tensor] = {}
    for file in checkpoint.files:
        held |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return held.__getitem__


def _is_wide(info: TensorInfo) -> bool:
    return info.is_floating and info.dtype is not None and _is_beyond_half(info.dtype)


def _dtype(name: str | None) -> torch.dtype | None:
    try:
        return dtype_from_name(name)
    except RuntimeError:  # has its own check
        return None


def _is_beyond_half(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and torch.finfo(dtype).max > _HALF


# mergekit 0.1.5's methods that divide by the sum of the weights, whatever it is, with the parameter
# that says whether. Others (ties, della, nuslerp) look at it first, or have no weights.
_DIVIDING = {"linear": "normalize", "multislerp": "normalize_weights"}
_NOTHING = 1e-6  # of the weights' own size: rounding makes it of 0.1 + 0.2 - 0.3 in float32


def check_divisors(merges: Sequence[Merge], method: str) -> Iterator[Finding]:
    """Report tensors whose weights sum to 0 where the method divides by that: all would be NaN."""
    if method not in _DIVIDING:
        return
    names = []
    for merge in merges:
        base = merge.planned.base if method == "multislerp" else None  # it has no weight there
        held = [label for label in merge.inputs if label != base]
        weights = [merge.planned.weights.get(label, 1.0) for label in held]
        alone = len(weights) < 2 and method == "multislerp"  # passed through
        divides = merge.is_floating and merge.planned.parameters.get(_DIVIDING[method], True)
        if divides and not alone and abs(sum(weights)) <= _NOTHING * sum(map(abs, weights)):
            names.append(merge.planned.name)
    if names:
        yield problem(
            f"the models' weights sum to 0 for {count(len(names), 'tensor')} ({some(names)}), and "
            f"{method} divides by the sum: mergekit would save NaN or infinite values",
            "give the models weights that sum to more than 0 for every tensor",
        )
