"""The way back: one task's full checkpoint, or its tensors one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cart_plugin.checkpoints import names as naming
from cart_plugin.checkpoints import side_files, writing
from cart_plugin.checkpoints.adapters import BASE_RECORD
from cart_plugin.checkpoints.digests import digest
from cart_plugin.checkpoints.files import check_space, read_json, unfinished, write_json
from cart_plugin.checkpoints.names import Unit
from cart_plugin.checkpoints.reading import CONFIG, Checkpoint, open_adapter, read_config
from cart_plugin.compress import peft_files
from cart_plugin.compress.inputs import open_model
from cart_plugin.compress.layers import Layer, Structure, nested
from cart_plugin.compress.report import FILE
from cart_plugin.compress.work import ADAPTERS, BASE, TASK_CONFIG, Progress
from cart_plugin.errors import CartError, CheckpointError


def tasks(folder: str | Path) -> list[str]:
    """Names of the tasks of a folder that `compress` has written.

    Raises:
        CartError: it is no such folder.
    """
    return list(_entries(Path(folder)))


def _entries(root: Path) -> dict[str, dict[str, Any]]:
    """What the report says of each task."""
    try:
        return dict(read_json(root / FILE)["tasks"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CartError(
            f"{root} is no folder that `mergekit-cart compress` has written: {FILE} is missing or "
            "broken"
        ) from None


def task_tensors(folder: str | Path, name: str) -> Iterator[tuple[str, Tensor]]:
    """One task's tensors, one after the other, under the names of its checkpoint.

    Args:
        folder: written by `compress`.
        name: one of `tasks(folder)`.

    Raises:
        CartError: there is no such folder or task, or files are missing.
    """
    task = _Task(Path(folder), name)
    for unit in task.units:
        yield from task.restored(unit).items()


def load_task(folder: str | Path, name: str) -> dict[str, Tensor]:
    """One task's whole state dict, under the names of its checkpoint; see `task_tensors`."""
    return dict(task_tensors(folder, name))


def expand(
    folder: str | Path, name: str, out: str | Path, *, progress: Progress | None = None
) -> None:
    """Write one task's full checkpoint, as it was before `compress` but for what that has lost.

    Args:
        folder: written by `compress`.
        name: one of `tasks(folder)`.
        out: the folder to write; must not exist, or be empty. It appears when all is done.
        progress: is told how far the work is.

    Raises:
        CartError: as `task_tensors`; ``out`` exists, or the disk is full.
    """
    task = _Task(Path(folder), name)
    layout = task.base.layout
    files = writing.shards(layout)
    with unfinished(Path(out)) as place:
        check_space(place, writing.file_bytes(layout))
        with ExitStack() as stack:
            opened = {}
            for file, part in files.items():
                writer = stack.enter_context(writing.TensorFile(place / file, part))
                opened.update(dict.fromkeys(part, writer))
            for done, unit in enumerate(task.units, 1):
                for source, tensor in task.restored(unit).items():
                    opened[source].write(source, tensor)
                if progress is not None:
                    progress("expanding", done, len(task.units))
        writing.write_index(place, files)
        side_files.restore(task.base.path, task.place, task.absent_files, place)
        config = task.base.config
        if task.config is not None:
            config = {**task.config, "dtype": config["dtype"]}
            config.pop("torch_dtype", None)
        write_json(place / CONFIG, config, sort_keys=True)


def check_base(place: Path, name: str, base: Checkpoint) -> None:
    """Refuse a base that is not the one which an adapter was made around.

    Args:
        place: the adapter's folder.
        name: what errors call it.
        base: the base.

    Raises:
        CartError: it is another one, or nothing says which it was.
    """
    if not (place / BASE_RECORD).is_file():
        raise CheckpointError(
            f"adapter {name} has no {BASE_RECORD}, which says around what base it was made",
            "copy the whole folder that `compress` wrote, or compress the models again",
        )
    made_for = read_config(place, f"adapter {name}", BASE_RECORD).get("digest")
    if made_for != digest(base):
        raise CheckpointError(
            f"adapter {name} was made around other weights than those in {base.path}, such as an "
            "earlier base in its place",
            "name the base that `compress` wrote with it, or compress the models again",
        )


class _Task:
    """A base and one adapter."""

    def __init__(self, folder: Path, name: str) -> None:
        known = _entries(folder)
        if name not in known:
            raise CartError(f"{folder} has no task {name!r}; it has {', '.join(known)}")
        self.place = place = folder / ADAPTERS / name
        self.absent_files: list[str] = known[name].get("absent_files", [])
        self.base = open_model(folder / BASE, f"the base of {folder}")
        check_base(place, name, self.base)
        own = (place / TASK_CONFIG).exists()
        self.config = read_config(place, f"adapter {name}", TASK_CONFIG) if own else None
        self._adapter = open_adapter(place, name)
        meta = naming.meta_model(self.base.path, self.base.config, self.base.name)
        shapes = {source: stored.shape for source, stored in self.base.tensors.items()}
        self.units = naming.units(meta, shapes)
        targets = [target for unit in self.units for target in unit.targets]
        self._layers = self._find(Structure(meta, targets), self._adapter.config)
        self._biases = {f"{layer.module}.bias": layer for layer in self._layers.values()}

    def restored(self, unit: Unit) -> dict[str, Tensor]:
        """A unit's tensors in the checkpoint, in the base's dtype."""
        stored = {source: self.base.read(source) for source in unit.sources}
        if not unit.targets:
            return stored
        found = {
            name: self._with_adapter(name, tensor) for name, tensor in unit.to_model(stored).items()
        }
        return unit.to_checkpoint(found)

    def _with_adapter(self, name: str, tensor: Tensor) -> Tensor:
        exact = peft_files.exact_name(name)
        if exact in self._adapter.tensors:
            return self._adapter.read(exact)
        if name in self._layers:
            layer = self._layers[name]
            a, b = (self._adapter.read(peft_files.lora_name(layer, side)) for side in "AB")
            delta = layer.difference(a, b).mul_(self._scaling(layer))
            return (delta + tensor).to(tensor.dtype)
        bias = self._biases.get(name)
        if bias is not None and peft_files.bias_name(bias) in self._adapter.tensors:
            delta = self._adapter.read(peft_files.bias_name(bias))
            work = torch.promote_types(tensor.dtype, torch.float32)
            return (tensor.to(work) + delta.to(work) * self._scaling(bias)).to(tensor.dtype)
        return tensor

    def _scaling(self, layer: Layer) -> float:
        rows = self._adapter.tensors[peft_files.lora_name(layer, "A")].shape[0]
        return peft_files.scaling(self._adapter.config, layer, rows)

    def _find(self, structure: Structure, settings: Mapping[str, Any]) -> dict[str, Layer]:
        """The layers that the adapter holds, by the parameter's name."""
        parameters = set(settings.get("target_parameters") or ())
        layers = {}
        for name in structure.state:
            layer = structure.layer(name)
            if name in parameters and (layer is None or not layer.is_parameter):
                layer = structure.as_parameter(name)
            if layer is None:
                continue
            if layer.is_parameter:
                if name in parameters:
                    layers[name] = layer
            elif peft_files.lora_name(layer, "A") in self._adapter.tensors:
                layers[name] = layer
        return nested(layers, structure)
