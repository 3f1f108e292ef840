"""Model folders, read one tensor at a time.

Tensors are read into memory of their own rather than mapped: of a mapped file every page that was
touched stays resident, and T models would fill the memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cart_plugin.errors import CartError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Packed types (4 and 6 bits, bare scales, wide unsigned integers) are missing: torch has no name or
# no use for them. The 8-bit floats are there to be named, though they cannot be averaged either.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""safetensors' names of dtypes."""

_AGAIN = "copy or download the model again"
_QUANTISED = (
    "quantised weights cannot be averaged, convert them to a floating-point checkpoint first"
)


class UnknownDtypeError(ValueError):
    """A tensor of a dtype that torch, or this program, has no use for."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file, first byte, and what it is."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class ModelFolder:
    """A model on the disk.

    Attributes:
        name: what errors and results call it.
        path: its folder.
        config: its config.json.
        tensors: where its tensors lie, in the order of their names.
        files: its weight files.
    """

    name: str
    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Size of its weight files."""
        return sum(file.stat().st_size for file in self.files)

    def read(self, name: str) -> Tensor:
        """A tensor's values.

        Raises:
            CartError: the file cannot be read.
        """
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        data = as_bytes(tensor)
        try:
            with stored.file.open("rb", buffering=0) as file:
                file.seek(stored.start)
                got = 0
                while got < len(data):
                    count = file.readinto(data[got:])
                    if not count:
                        raise CartError(
                            f"model {self.name}: {stored.file.name} ends within {name}; {_AGAIN}"
                        )
                    got += count
        except OSError as error:
            raise CartError(f"model {self.name}: {stored.file}: {error.strerror}") from None
        return tensor


def open_model(path: Path, name: str) -> ModelFolder:
    """Read what a folder holds: its config and the headers of its weight files.

    Raises:
        CartError: it is no model folder, a shard is missing or truncated, or its weights are
            quantised or not safetensors.
    """
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise CartError(f"model {path} {found}; name a local folder with config.json and weights")
    model = ModelFolder(name, path)
    model.config = _json(model, path / "config.json")
    if model.config.get("quantization_config"):
        raise CartError(f"model {name}: config.json has a quantization_config; {_QUANTISED}")
    listed: dict[str, str] | None = None
    # Of a folder that has both, one is stale, and transformers reads the single file.
    if (path / SINGLE).is_file():
        model.files = [path / SINGLE]
    elif (path / INDEX).is_file():
        listed = _weight_map(model)
        model.files = [path / file for file in sorted(set(listed.values()))]
    elif any(path.glob("*.bin")):
        raise CartError(
            f"model {name} has its weights in .bin files, which are not read (loading them may run "
            "code); load it with transformers and save it with save_pretrained"
        )
    else:
        raise CartError(f"model {name}: no {SINGLE} and no {INDEX} in {path}")
    held: dict[str, StoredTensor] = {}
    for file in model.files:
        if not file.is_file():
            raise CartError(f"model {name}: shard {file.name} is missing from {path}; {_AGAIN}")
        held.update(_header(model, file))
    if listed is not None:
        for tensor, shard in listed.items():
            if tensor not in held or held[tensor].file.name != shard:
                raise CartError(
                    f"model {name}: {shard} lacks {tensor}, which {INDEX} lists there; {_AGAIN}"
                )
        held = {tensor: held[tensor] for tensor in listed}
    model.tensors = dict(sorted(held.items()))
    return model


def open_models(paths: Sequence[Path], names: Sequence[str]) -> list[ModelFolder]:
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


def open_base(path: Path, first: ModelFolder) -> ModelFolder:
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


def check_holds(model: ModelFolder, wanted: Collection[str], other: ModelFolder) -> None:
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


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a safetensors file lie.

    Raises:
        UnknownDtypeError: a tensor cannot be read.
        ValueError: it is no whole safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError("it is truncated, or no safetensors file")
        entries = json.loads(opened.read(length))
    if not isinstance(entries, dict):
        raise ValueError("its header is no JSON object")
    found = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise UnknownDtypeError(f"tensor {name!r} is {entry['dtype']}")
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = StoredTensor(file, start, tuple(entry["shape"]), DTYPES[entry["dtype"]])
        if end > size or found[name].bytes != end - start:
            raise ValueError("it is truncated, or still being written")
    return found


def as_bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def _header(model: ModelFolder, file: Path) -> dict[str, StoredTensor]:
    try:
        return read_header(file)
    except UnknownDtypeError as error:
        raise CartError(f"model {model.name}: {file.name}: {error}; {_QUANTISED}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CartError(f"model {model.name}: {file.name}: {error}; {_AGAIN}") from None


def _json(model: ModelFolder, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CartError(
            f"model {model.name} has no {file.name} in {model.path}; name a folder that "
            "save_pretrained wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise CartError(f"model {model.name}: {file.name}: {error}; {_AGAIN}") from None
    if not isinstance(found, dict):
        raise CartError(f"model {model.name}: {file.name} is no JSON object; {_AGAIN}")
    return found


def _weight_map(model: ModelFolder) -> dict[str, str]:
    """The shard of each tensor."""
    found = _json(model, model.path / INDEX).get("weight_map")
    if not isinstance(found, dict):
        raise CartError(f"model {model.name}: {INDEX} has no weight_map; {_AGAIN}")
    for tensor, shard in found.items():
        if not isinstance(shard, str):
            raise CartError(
                f"model {model.name}: {INDEX} names no file for {tensor}: {shard!r}; {_AGAIN}"
            )
    return found


def _check_architecture(model: ModelFolder, first: ModelFolder) -> None:
    here, there = model.config.get("architectures"), first.config.get("architectures")
    if here != there:
        raise CartError(
            f"model {model.name} is {_listed(here)} but {first.name} is {_listed(there)}; "
            "models that share a base must have the same architecture"
        )


def _check_shapes(model: ModelFolder, first: ModelFolder) -> None:
    for tensor, stored in first.tensors.items():
        if model.tensors[tensor].shape != stored.shape:
            raise CartError(
                f"tensor {tensor!r} is {stored.shape} in {first.name} but "
                f"{model.tensors[tensor].shape} in {model.name}; models that share a base must "
                "have the same shapes: leave heads of different sizes and added tokens out"
            )


def _check_dtypes(model: ModelFolder, first: ModelFolder) -> None:
    for tensor, stored in first.tensors.items():
        dtype = model.tensors[tensor].dtype
        if dtype.is_floating_point and dtype.itemsize == 1:
            raise CartError(f"tensor {tensor!r} of {model.name} is {dtype}; {_QUANTISED}")
        if dtype.is_floating_point != stored.dtype.is_floating_point:
            raise CartError(
                f"tensor {tensor!r} is {dtype} in {model.name} but {stored.dtype} in "
                f"{first.name}; convert one of them"
            )


def _listed(architectures: object) -> str:
    return ", ".join(architectures) if isinstance(architectures, list) else "of no architecture"
