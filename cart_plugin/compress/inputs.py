"""The models that are compressed together, and what has to be alike in them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from cart_plugin.checkpoints import names
from cart_plugin.checkpoints.names import Unit
from cart_plugin.checkpoints.placement import contradiction, place, quantised
from cart_plugin.checkpoints.reading import ADAPTER_CONFIG, CONFIG, Checkpoint, open_folder
from cart_plugin.errors import CartError, CheckpointError
from cart_plugin.wording import count, some

_QUANTISED = (
    "quantised weights cannot be averaged, convert them to a floating-point checkpoint first"
)


def open_model(path: Path, name: str) -> Checkpoint:
    """Read what a folder holds: its config and the headers of its weight files.

    Raises:
        CartError: it is no model folder but an adapter's, a shard is missing or truncated, or its
            weights are quantised or not safetensors.
    """
    if (path / ADAPTER_CONFIG).is_file() and not (path / CONFIG).is_file():
        raise CheckpointError(
            f"model {name} is an adapter, not a model: {path} has {ADAPTER_CONFIG} and no {CONFIG}",
            "merge it into its base first (PEFT's merge_and_unload, then save_pretrained) and name "
            "that folder; an adapter needs no compression",
        )
    model = open_folder(path, name)
    if model.config.get("quantization_config"):
        raise CartError(f"model {name}: config.json has a quantization_config; {_QUANTISED}")
    for tensor, info in model.tensors.items():
        if info.dtype is None:
            raise CartError(f"model {name}: tensor {tensor!r} is {info.stored}; {_QUANTISED}")
    packed = [name for name in quantised(model) if not model.tensors[name].is_float8]
    if packed:  # such as GPTQ's integers, whatever the config says
        raise CartError(
            f"model {name}: tensor {packed[0]!r} is packed {model.dtype(packed[0])}; {_QUANTISED}"
        )
    return model


def untied(models: Sequence[Checkpoint], meta: Any, units: Sequence[Unit]) -> list[str]:
    """Names that configs tie and files hold different values for; the configs are corrected.

    transformers 5 then loads both, whatever its config says.

    Args:
        models: of one architecture; their `config` says afterwards that nothing is tied.
        meta: from `names.meta_model`.
        units: of its tensors.

    Raises:
        CartError: these ties are none that the config can undo.
    """
    source = {unit.targets[0]: unit.sources[0] for unit in units if len(unit.targets) == 1}
    found: list[str] = []
    for same in names.tied_names(meta).values():
        held = [source[name] for name in same if name in source]
        for model in models if len(held) > 1 else ():
            first = model.read(held[0])
            if not all(torch.equal(first, model.read(other)) for other in held[1:]):
                found += [name for name in same if name in source]
                break
    if not found:
        return []
    for model in models:
        model.config = {**model.config, "tie_word_embeddings": False}
    again = names.meta_model(models[-1].path, models[-1].config, models[-1].name)
    tied = [name for same in names.tied_names(again).values() for name in same]
    if set(found) & set(tied):
        raise CheckpointError(
            f"{models[0].name}: {found[0]} and {found[1]} are one weight of the model, but its "
            "file holds two different ones",
            "load the model with transformers and save it again",
        )
    return found


def random_weights(model: Checkpoint) -> list[str]:
    """Weights that a model's config describes and no file holds: every loading draws new ones.

    Raises:
        CartError: some of them belong to layers of which other ones are there: the config describes
            a larger model.
    """
    lacking = contradiction(model).lacking
    if lacking:
        raise CheckpointError(
            f"model {model.name}: {CONFIG} describes {len(lacking)} weights that no file holds, "
            f"such as {lacking[0]}; they would be random",
            f"correct the number of layers in {CONFIG}, or fetch the missing weights",
        )
    placement = place(model)
    return [] if placement is None else sorted(placement.missing)


def open_models(paths: Sequence[Path], labels: Sequence[str]) -> list[Checkpoint]:
    """Open models that are to be compressed together.

    Raises:
        CartError: as `open_model`; and the models differ in architecture, tensors or shapes.
    """
    models = [open_model(path, name) for path, name in zip(paths, labels, strict=True)]
    first = models[0]
    for model in models[1:]:
        _check_architecture(model, first)
        check_holds(model, first.tensors, first)
        check_holds(first, model.tensors, model)
        _check_shapes(model, first)
    for model in models:
        _check_dtypes(model, first)
    return models


def open_base(path: Path, first: Checkpoint) -> Checkpoint:
    """Open a model that others, of which ``first`` is one, are to have as their base.

    It may hold more tensors than they do; whether these matter is for the model's class to say.

    Raises:
        CartError: as `open_models`.
    """
    base = open_model(path, "base")
    _check_architecture(base, first)
    check_holds(base, first.tensors, first)
    _check_shapes(base, first)
    _check_dtypes(base, first)
    return base


def check_holds(model: Checkpoint, wanted: Collection[str], other: Checkpoint) -> None:
    """Refuse a model that lacks any of the tensors ``wanted`` of another.

    Raises:
        CartError: it does.
    """
    missing = sorted(set(wanted) - set(model.tensors))
    if missing:
        raise CartError(
            f"model {model.name} lacks {count(len(missing), 'tensor')} that {other.name} has "
            f"({some(missing)}); models that share a base must have the same tensors: if both are "
            "of one architecture, load and save each with one version of transformers"
        )


def _check_architecture(model: Checkpoint, first: Checkpoint) -> None:
    here, there = model.config.get("architectures"), first.config.get("architectures")
    if here != there:
        raise CartError(
            f"model {model.name} is {_listed(here)} but {first.name} is {_listed(there)}; "
            "models that share a base must have the same architecture"
        )


def _check_shapes(model: Checkpoint, first: Checkpoint) -> None:
    for tensor, stored in first.tensors.items():
        if model.tensors[tensor].shape != stored.shape:
            raise CartError(
                f"tensor {tensor!r} is {stored.shape} in {first.name} but "
                f"{model.tensors[tensor].shape} in {model.name}; models that share a base must "
                "have the same shapes: leave heads of different sizes and added tokens out"
            )


def _check_dtypes(model: Checkpoint, first: Checkpoint) -> None:
    for tensor in first.tensors:
        dtype, there = model.dtype(tensor), first.dtype(tensor)
        if dtype.is_floating_point and dtype.itemsize == 1:
            raise CartError(f"tensor {tensor!r} of {model.name} is {dtype}; {_QUANTISED}")
        if dtype.is_floating_point != there.is_floating_point:
            raise CartError(
                f"tensor {tensor!r} is {dtype} in {model.name} but {there} in "
                f"{first.name}; convert one of them"
            )


def _listed(architectures: object) -> str:
    return ", ".join(architectures) if isinstance(architectures, list) else "of no architecture"
