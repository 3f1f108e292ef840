"""Whether models can be merged with each other at all: stored as numbers, and named alike."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from cart_plugin.checkpoints.configs import parts
from cart_plugin.checkpoints.headers import read_header
from cart_plugin.checkpoints.placement import quantised
from cart_plugin.checkpoints.reading import (
    CONFIG,
    MERGEKIT_ORDER,
    Checkpoint,
    read_config,
    read_weights,
)
from cart_plugin.errors import CheckpointError


class StrangersError(CheckpointError):
    """Models have other names than those by which mergekit would merge them."""


_NUMBER = re.compile(r"\d+")


def headers(name: str, path: Path) -> Checkpoint:
    """What can be read of a model at no cost: config and headers, as far as it goes.

    Of pickles, too: mergekit reads them, and casts what they hold as it does safetensors.

    Args:
        name: what errors call it.
        path: its folder, or its weight file.
    """
    found = Checkpoint(name, path)
    try:
        if path.is_file():
            found.tensors = read_header(path, f"model {name}")
        elif path.is_dir():
            if (path / CONFIG).is_file():
                found.config = read_config(path, f"model {name}")
            read_weights(found, MERGEKIT_ORDER)
    except CheckpointError:
        pass  # whoever needs the file says so
    return found


def quantised_fact(model: Checkpoint) -> tuple[str, str] | None:
    """That a model's weights are stored in a way that cannot be merged, and what to do."""
    weights = quantised(model)
    if not weights:
        return None
    kinds = sorted({str(model.tensors[name].dtype or "packed") for name in weights})
    what = "quantised"
    if all(model.tensors[name].is_float8 for name in weights):
        what = "float8"
    more = f" and {len(weights) - 3:,} more" if len(weights) > 3 else ""
    return (
        f"model {model.name} holds {', '.join(kinds)} weights ({', '.join(weights[:3])}{more}); "
        f"{what} weights cannot be merged",
        "merge the original model, or dequantise this one and save it as bfloat16, without its "
        "quantization_config",
    )


def left_quantisation(model: Checkpoint) -> list[dict[str, Any]]:
    """The parts of a model's config that call weights quantised which are stored as they are.

    Loading such a model asks for the quantisation's library, or for scales.
    """
    found = [
        part
        for _, part in parts(model.config)
        # BitNet's original weights are quantised by the model itself, each time it computes.
        if isinstance(named := part.get("quantization_config"), dict)
        and named.get("quantization_mode") != "online"
    ]
    return found if found and not quantised(model) else []


def check_stored(models: Sequence[Checkpoint]) -> None:
    """Refuse quantised weights, which a cast to another dtype would hide.

    Raises:
        CheckpointError: a model has some.
    """
    for model in models:
        if found := quantised_fact(model):
            raise CheckpointError(*found)


def strangers(namer: Checkpoint, models: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those of some models that hold less than half of the tensors by one model's names.

    Numbers do not count: experts may be stored one by one, or stacked.
    """
    kinds = _kinds(namer.tensors)
    return [model for model in models if 2 * len(kinds & _kinds(model.tensors)) < len(kinds)]


def _kinds(names: Collection[str]) -> set[str]:
    return {_NUMBER.sub("N", name) for name in names}


def unmerged(models: Sequence[Checkpoint]) -> Iterator[str]:
    """The tensors that mergekit copies by itself: integers, and what one of the models holds."""
    held = Counter(name for model in models for name in model.tensors)
    for model in models:
        for name, info in model.tensors.items():
            if not info.is_floating or (held[name] == 1 and len(models) > 1):
                yield name


def stranger_fact(
    namer: str, others: Sequence[str], example: tuple[str, str], *, is_base: bool
) -> tuple[str, str]:
    """That models do not take part in a merge by another model's names, and what to do.

    Args:
        namer: whose names the merge goes by.
        others: the models that do not have them.
        example: one of its names, and one of theirs.
        is_base: it is the base model.
    """
    who = f"models {', '.join(others[:3])}" if len(others) > 1 else f"model {others[0]}"
    more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
    fact = (
        f"{who}{more} lack most tensors by the names of {namer} ({example[0]} there, "
        f"{example[1]} in {others[0]}), by which mergekit merges; the result would be {namer} alone"
    )
    advice = "save all models with one class (the `...For...` class of the fine-tuned ones)"
    if is_base:
        advice = (
            "save the base with the class of the fine-tuned models, or leave base_model out where "
            "nothing needs it (center: base and task arithmetic do; cart_auto of two to four "
            "models is the better for it)"
        )
    return fact, advice
