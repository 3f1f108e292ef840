"""Model folders and adapters, read one tensor at a time: the project's one reader.

Tensors are read into memory of their own rather than mapped: of a mapped file every page that was
touched stays resident, and T models would fill the memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cart_plugin.checkpoints.files import read_json
from cart_plugin.checkpoints.headers import (
    AGAIN,
    StoredTensor,
    TensorInfo,
    read_header,
    unreadable,
)
from cart_plugin.errors import CartError, CheckpointError, first_line

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# Of a folder that has several of these one is stale, and programs differ in which they take.
TRANSFORMERS_ORDER = (SINGLE, INDEX)
MERGEKIT_ORDER = (INDEX, SINGLE, "pytorch_model.bin.index.json", "pytorch_model.bin")


@dataclass
class Checkpoint:
    """A model or an adapter on the disk.

    Attributes:
        name: what errors and results call it.
        path: its folder, or its weight file.
        config: its config.json (of an adapter, its adapter_config.json); empty for weight files.
        tensors: by name, from the headers.
        files: its weight files.
    """

    name: str
    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    @property
    def model_type(self) -> str:
        """From its config; empty where that names none."""
        found = self.config.get("model_type")
        return found if isinstance(found, str) else ""

    @property
    def bytes(self) -> int:
        """Size of its weight files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor, as `writing` takes them."""
        return {name: (self.dtype(name), info.shape) for name, info in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, which must be one that torch knows."""
        found = self.tensors[name].dtype
        assert found is not None, name
        return found

    def read(self, name: str) -> Tensor:
        """The values of a tensor of a safetensors file.

        Raises:
            CartError: the file cannot be read.
        """
        stored = self.tensors[name]
        assert isinstance(stored, StoredTensor), name
        tensor = torch.empty(stored.shape, dtype=self.dtype(name), device="cpu")
        data = as_bytes(tensor)
        try:
            with stored.file.open("rb", buffering=0) as file:
                file.seek(stored.start)
                got = 0
                while got < len(data):
                    count = file.readinto(data[got:])
                    if not count:
                        raise CartError(
                            f"{self.name}: {stored.file.name} ends within {name}; {AGAIN}"
                        )
                    got += count
        except OSError as error:
            raise CartError(f"{self.name}: {stored.file}: {error.strerror}") from None
        return tensor


def as_bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def read_config(folder: Path, who: str, file: str = CONFIG) -> dict[str, Any]:
    """A JSON file of a folder.

    Args:
        folder: the model's or adapter's.
        who: whose file it is, for errors: "model math".
        file: its name.

    Raises:
        CheckpointError: it is missing, or no JSON object.
    """
    try:
        return read_json(folder / file)
    except FileNotFoundError:
        raise CheckpointError(
            f"{who} has no {file} in {folder}", "name a folder that save_pretrained wrote"
        ) from None
    except OSError as error:
        raise unreadable(folder / file, who, error) from None
    except ValueError as error:
        raise CheckpointError(f"{who}: {file} cannot be read: {first_line(error)}", AGAIN) from None


def read_weights(checkpoint: Checkpoint, order: tuple[str, ...]) -> None:
    """Find the weight files of a folder and what they hold: fills in `files` and `tensors`.

    Args:
        checkpoint: of a folder.
        order: names of files and indexes; the first that is there decides.

    Raises:
        CheckpointError: there are none, one is missing or broken, or lacks what an index lists.
    """
    who, folder = f"model {checkpoint.name}", checkpoint.path
    try:
        start = next((name for name in order if (folder / name).is_file()), None)
    except OSError as error:
        raise unreadable(folder, who, error) from None
    if start is None:
        single = " or ".join(name for name in order if not name.endswith(".json"))
        raise CheckpointError(
            f"{who} has no {single}, nor {'an' if ' or ' in single else 'its'} index, in {folder}",
            "name the folder that save_pretrained wrote, not its parent",
        )
    if not start.endswith(".json"):
        checkpoint.files = [folder / start]
        checkpoint.tensors = read_header(folder / start, who)
        _check_counts(checkpoint)
        return
    listed = _weight_map(folder / start, who)
    held = {}
    shards = sorted(set(listed.values()))
    missing = [shard for shard in shards if not _is_file(folder / shard)]
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        verb = "are" if more else "is"
        raise CheckpointError(
            f"{who}: shard {missing[0]}{more} {verb} missing from {folder}", AGAIN
        )
    for shard in shards:
        held[shard] = read_header(folder / shard, who)
    checkpoint.files = [folder / shard for shard in held]
    lacking = [name for name, shard in listed.items() if name not in held[shard]]
    if lacking:
        more = f" and {len(lacking) - 1:,} more" if len(lacking) > 1 else ""
        raise CheckpointError(
            f"{who}: {listed[lacking[0]]} lacks {lacking[0]}{more}, which the index lists there",
            AGAIN,
        )
    omitted = sorted(
        name
        for names in held.values()
        for name, info in names.items()
        if name not in listed and not _is_computed(name, info)
    )
    if omitted:
        more = f" and {len(omitted) - 1:,} more" if len(omitted) > 1 else ""
        raise CheckpointError(
            f"{who}: {start} leaves out {omitted[0]}{more}, which a shard of it holds; programs "
            "that go by the index lose it",
            "load the model with transformers and save it again, or " + AGAIN,
        )
    checkpoint.tensors = {name: held[shard][name] for name, shard in listed.items()}
    _check_counts(checkpoint)


_COMPUTED = re.compile(r"(?:^|\.)(?:inv_freq|masked_bias|position_ids)$")


def _is_computed(name: str, info: TensorInfo) -> bool:
    """Whether a tensor is one that old files hold and every model computes anew: nobody lacks it.

    By its name: no model is built to read a header.
    """
    is_mask = name.endswith(".bias") and len(info.shape) == 4
    return is_mask or _COMPUTED.search(name) is not None


# More layers than tensors, or a label for each of millions: transformers would build them all.
_LAYERS = re.compile(r"layers?$|depths?$|blocks$")
_ANY_MODEL = {"layers": 1_000, "labels": 1_000_000}


def _check_counts(checkpoint: Checkpoint) -> None:
    """Refuse a config that describes a model of another order of size than the weights are.

    Raises:
        CheckpointError: building it would take hours, and memory without end.
    """
    limits = {**_ANY_MODEL, "layers": max(_ANY_MODEL["layers"], len(checkpoint.tensors))}
    for key, number in _numbers(checkpoint.config):
        kind = "labels" if key == "num_labels" else "layers" if _LAYERS.search(key) else None
        if kind is not None and number > limits[kind]:
            raise CheckpointError(
                f"model {checkpoint.name}: {CONFIG} says {key}: {number:,}, and the weights are "
                f"{len(checkpoint.tensors):,} tensors",
                f"correct {CONFIG}, or {AGAIN}",
            )


def _numbers(config: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, float]]:
    """The numbers of a config with their keys; those of a list have its key."""
    if isinstance(config, dict) and depth < 5:
        for name, value in config.items():
            yield from _numbers(value, name, depth + 1)
    elif isinstance(config, list) and len(config) < 100:
        for value in config:
            yield from _numbers(value, key, depth + 1) if depth < 5 else ()
    elif isinstance(config, int | float) and not isinstance(config, bool):
        yield key, config


def _is_file(path: Path) -> bool:
    """Whether there is a file; a name that no file can have is none's."""
    try:
        return path.is_file()
    except OSError:
        return False


def _weight_map(index: Path, who: str) -> Mapping[str, str]:
    """The shard of each tensor."""
    found = read_config(index.parent, who, index.name).get("weight_map")
    if not isinstance(found, dict):
        raise CheckpointError(f"{who}: {index.name} has no weight_map", AGAIN)
    for tensor, shard in found.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                f"{who}: {index.name} names no file for {tensor}: {shard!r}", AGAIN
            )
    return found


def open_folder(path: Path, name: str) -> Checkpoint:
    """A model's folder with safetensors, as transformers reads it; tensors in order of their names.

    Raises:
        CheckpointError: it is no such folder, or something of it is missing or broken.
    """
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(
            f"model {path} {found}", "name a local folder with config.json and weights"
        )
    model = Checkpoint(name, path, read_config(path, f"model {name}"))
    if not any((path / file).is_file() for file in TRANSFORMERS_ORDER) and any(path.glob("*.bin")):
        raise CheckpointError(
            f"model {name} has its weights in .bin files, which are not read (loading them may run "
            "code)",
            "load it with transformers and save it with save_pretrained",
        )
    read_weights(model, TRANSFORMERS_ORDER)
    model.tensors = dict(sorted(model.tensors.items()))
    return model


def open_adapter(path: Path, name: str) -> Checkpoint:
    """A PEFT adapter's folder.

    Raises:
        CheckpointError: it has no config or no weights, or one of them is broken.
    """
    who, weights = f"adapter {name}", path / ADAPTER_WEIGHTS
    config = read_config(path, who, ADAPTER_CONFIG)
    if not weights.exists() and any(path.glob("adapter_model*.bin")):
        raise CheckpointError(
            f"{who} has its weights in .bin files, which are not read (loading them may run code)",
            "load it with PEFT and save it with save_pretrained",
        )
    if not weights.exists() and any(path.glob("adapter_model-*.safetensors")):
        raise CheckpointError(
            f"{who} has its weights in several files, which PEFT does not load either",
            f"put them into one, {ADAPTER_WEIGHTS}",
        )
    tensors = read_header(weights, who)
    for tensor, info in tensors.items():
        if info.dtype is None:
            raise CheckpointError(
                f"{who}: tensor {tensor!r} is {info.stored}, which torch has no use for",
                "make the adapter again with floating-point weights",
            )
    return Checkpoint(name, path, config, tensors, [weights])
