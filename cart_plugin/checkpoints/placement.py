"""What a checkpoint's class does with its tensors: which are weights, and which have no place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cart_plugin.checkpoints import names
from cart_plugin.checkpoints.headers import TensorInfo
from cart_plugin.checkpoints.reading import Checkpoint

# Of classes that transformers does not have: masks and indices, by the names that are in use.
_BUFFER = re.compile(
    r"(?:^|[._])(?:bias|masks?|ids|index|indices|buffer|counter|num_batches_tracked)$"
)

_Shape = tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """A checkpoint against its class.

    Attributes:
        targets: for each tensor its names in the model's state dict; none where it has no place.
        parameters: names of the model's floating-point parameters and buffers.
        missing: those of its parameters that no floating-point tensor fills.
        unlike: the names of floating-point tensors that have another shape than there: as stored,
            and by the config. Of a vocabulary, which may have more rows, only the width counts.
    """

    targets: Mapping[str, Sequence[str]]
    parameters: frozenset[str]
    missing: frozenset[str]
    unlike: Mapping[str, tuple[_Shape, _Shape]]


def place(checkpoint: Checkpoint) -> Placement | None:
    """Where a checkpoint's tensors go; None where transformers cannot build its class."""
    try:
        model = names.meta_model(checkpoint.path, checkpoint.config, checkpoint.name)
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        units = names.one_way(model, shapes)
        unlike = dict(_unlike(model, units, checkpoint))
    except Exception:  # its own code, or packed tensors that no conversion takes
        return None
    targets = {source: unit.targets for unit in units for source in unit.sources}
    filled = {
        target
        for source, found in targets.items()
        if checkpoint.tensors[source].is_floating
        for target in found
    }
    for same in names.tied_names(model).values():
        if not filled.isdisjoint(same):
            filled.update(same)
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return Placement(
        targets, frozenset(_floating(model.state_dict())), frozenset(own - filled), unlike
    )


def _unlike(
    model: Any, units: Sequence[names.Unit], checkpoint: Checkpoint
) -> Iterator[tuple[str, tuple[_Shape, _Shape]]]:
    state, tables, held = model.state_dict(), names.vocabulary_names(model), checkpoint.tensors
    for unit in units:
        if not all(held[source].is_floating for source in unit.sources):
            continue
        empty = {source: torch.empty(held[source].shape, device="meta") for source in unit.sources}
        for name, tensor in unit.to_model(empty).items():
            if name in state:
                stored, described = tuple(tensor.shape), tuple(state[name].shape)
                if stored != described and (name not in tables or stored[1:] != described[1:]):
                    yield name, (stored, described)


def _floating(state: Mapping[str, Any]) -> set[str]:
    return {name for name, tensor in state.items() if tensor.is_floating_point()}


def quantised(checkpoint: Checkpoint) -> list[str]:
    """Names of weights that are stored as integers or 8-bit floats, and mean nothing averaged.

    Masks, indices and counters are no weights: the class has integers there, or no place at all
    and no parameter of the module missing.
    """
    narrow = [name for name, info in checkpoint.tensors.items() if info.is_float8]
    whole = [name for name, info in checkpoint.tensors.items() if _may_be_packed(info)]
    if not whole:
        return narrow
    placement = place(checkpoint)
    return narrow + [name for name in whole if _is_packed(name, placement)]


def _may_be_packed(info: TensorInfo) -> bool:
    floating = info.is_floating or info.is_float8
    return not floating and info.dtype is not torch.bool and len(info.shape) >= 2


def _is_packed(name: str, placement: Placement | None) -> bool:
    if placement is None:
        return not _BUFFER.search(name)
    targets = placement.targets.get(name, ())
    if targets:
        return any(target in placement.parameters for target in targets)
    module = name.rpartition(".")[0]
    # `q_proj.qweight` for `q_proj.weight`; the model's names may have another beginning.
    return any(
        _alike(missing, module) or _alike(missing.rpartition(".")[0], module)
        for missing in placement.missing
    )


def _alike(one: str, other: str) -> bool:
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def is_computed(name: str, info: TensorInfo) -> bool:
    """Whether a tensor without a place is a mask or table that models compute anew, and no weight.

    Old versions of transformers saved such: a `masked_bias` may be infinite, or beyond float16.
    """
    last = name.rpartition(".")[2]
    return not (last == "weight" or (last == "bias" and len(info.shape) == 1))


@dataclass(frozen=True)
class Contradiction:
    """What a checkpoint's weights and its config disagree on.

    Attributes:
        shapes: of weights, by their names in the model: as stored, and by the config.
        lacking: weights that no file holds, though it holds their like in other layers.
    """

    shapes: Mapping[str, tuple[_Shape, _Shape]]
    lacking: Sequence[str]


_LAYER = re.compile(r"\.\d+\.")


def contradiction(checkpoint: Checkpoint) -> Contradiction:
    """Compare a checkpoint with its config; nothing where transformers cannot build its class."""
    placement = place(checkpoint)
    if placement is None:
        return Contradiction({}, [])
    found = {_LAYER.sub(".N.", name) for targets in placement.targets.values() for name in targets}
    lacking = [name for name in placement.missing if _LAYER.sub(".N.", name) in found]
    return Contradiction(placement.unlike, sorted(lacking))


def computed(checkpoint: Checkpoint) -> list[str]:
    """Names of the masks and tables that a checkpoint's class computes anew."""
    return [
        name
        for name in without_place(checkpoint, list(checkpoint.tensors))
        if is_computed(name, checkpoint.tensors[name])
    ]


def without_place(checkpoint: Checkpoint, left: Sequence[str]) -> list[str]:
    """Those of some tensors that the class neither trains nor saves, such as old causal masks."""
    placement = place(checkpoint) if left else None
    if placement is None:
        return []
    return [name for name in left if not placement.targets.get(name)]
