"""The models that are compressed together, and what has to be alike in them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from cart_plugin.checkpoints.reading import Checkpoint, open_folder
from cart_plugin.errors import CartError

_QUANTISED = (
    "quantised weights cannot be averaged, convert them to a floating-point checkpoint first"
)


def open_model(path: Path, name: str) -> Checkpoint:
    """Read what a folder holds: its config and the headers of its weight files.

    Raises:
        CartError: it is no model folder, a shard is missing or truncated, or its weights are
            quantised or not safetensors.
    """
    model = open_folder(path, name)
    if model.config.get("quantization_config"):
        raise CartError(f"model {name}: config.json has a quantization_config; {_QUANTISED}")
    for tensor, info in model.tensors.items():
        if info.dtype is None:
            raise CartError(f"model {name}: tensor {tensor!r} is {info.stored}; {_QUANTISED}")
    return model


def open_models(paths: Sequence[Path], names: Sequence[str]) -> list[Checkpoint]:
    """Open models that are to be compressed together.

    Raises:
        CartError: as `open_model`; and the models differ in architecture, tensors or shapes.
    """
    models = [open_model(path, name) for path, name in zip(paths, names, strict=True)]
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
            f"model {model.name} lacks {len(missing)} tensors that {other.name} has, such as "
            f"{missing[0]}; models that share a base must have the same tensors"
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
