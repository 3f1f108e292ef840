"""mergekit's merge of whole models, planned from their tensors instead of an architecture.

The tasks are mergekit's own but for reading and writing, which go through the model's names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import FinalizeModel, TensorWriterTask
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask, TensorDictWrapper
from mergekit.options import MergeOptions

from cart_plugin.checkpoints.names import Unit, vocabulary_names
from cart_plugin.doctor.inputs import values
from cart_plugin.doctor.layout import references
from cart_plugin.errors import CartError
from cart_plugin.execution.inputs import Inputs
from cart_plugin.execution.layout import (
    Placed,
    check_alike,
    check_described,
    donor_model,
    place,
)
from cart_plugin.execution.settings import Settings
from cart_plugin.merging.inputs import agreed_buffer


class ModelTensors:
    """One input's tensors by the model's names, read when asked for."""

    def __init__(self, placed: Placed, options: MergeOptions) -> None:
        self.units = placed.units
        self.is_floating = placed.is_floating
        self.loader = values(placed.checkpoint, lazy_unpickle=options.lazy_unpickle)

    def read(self, name: str, device: str) -> torch.Tensor:
        """The values of one tensor."""
        unit = self.units[name]
        read = {source: self.loader.get_tensor(source, device=device) for source in unit.sources}
        return unit.to_model(read)[name]


class LoadModelTensor(Task[torch.Tensor]):
    """Reads one tensor of one input, in the recipe's dtype."""

    source: Any
    name: str
    dtype: str | None
    device: str

    def arguments(self) -> dict[str, Task]:
        """Nothing comes before it."""
        return {}

    def execute(self) -> torch.Tensor:
        """The tensor; what is not floating-point keeps its dtype."""
        tensor: torch.Tensor = self.source.read(self.name, self.device)
        dtype = dtype_from_name(self.dtype)
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


class KeepTensor(Task[torch.Tensor]):
    """Takes the one value of integers; of counters, which fine-tuned models differ in, the largest.

    mergekit stops at any integers that differ.
    """

    loads: tuple[Task, ...]
    models: tuple[str, ...]
    name: str

    def arguments(self) -> dict[str, Task]:
        """The models' tensors."""
        return {f"model{n}": task for n, task in enumerate(self.loads)}

    def execute(self, **tensors: torch.Tensor) -> torch.Tensor:
        """The value.

        Raises:
            CartError: tables of integers differ.
        """
        return agreed_buffer(list(tensors.values()), self.models, self.name)


class SaveUnit(Task[None]):
    """Writes merged tensors as the first model's file has them."""

    unit: Any
    parts: tuple[Task, ...]
    writer: TensorWriterTask
    clone: bool

    def arguments(self) -> dict[str, Task]:
        """The writer, and the merged tensors."""
        return {"writer": self.writer} | {f"part{n}": task for n, task in enumerate(self.parts)}

    def execute(self, writer: Any, **parts: torch.Tensor) -> None:
        """Undo transformers' conversion, and write."""
        merged = dict(zip(self.unit.targets, parts.values(), strict=True))
        for name, tensor in self.unit.to_checkpoint(merged).items():
            writer.save_tensor(name=name, tensor=tensor, clone=self.clone)

    def priority(self) -> int:
        """As early as possible: what is written needs no memory."""
        return 1000


def check(inputs: Inputs) -> tuple[Any, dict[str, Placed]]:
    """Whether a recipe can be merged tensor by tensor.

    Returns:
        The model, and each input's tensors under its names.

    Raises:
        CartError: why not.
    """
    config = inputs.config
    if not config.models:
        raise CartError("only whole models can be: write them under `models:`")
    if config.tokenizer or config.tokenizer_source or config.chat_template:
        raise CartError("tokenizers cannot be: delete the recipe's tokenizer settings")
    model = donor_model(inputs)
    placed = {label: place(model, held) for label, held in inputs.checkpoints.items()}
    check_described(model, placed[inputs.donor.name])
    check_alike(placed, inputs)
    if not any(held.shapes.keys() - held.unused for held in placed.values()):
        raise CartError("the models hold none of the tensors that their config describes")
    return model, placed


def tasks(inputs: Inputs, out: Path, options: MergeOptions) -> list[Task]:
    """The merge as tasks for mergekit's executors.

    Raises:
        CartError: as `check`; or the recipe is wrong.
    """
    model, placed = check(inputs)
    shared = set.intersection(*(set(held.units) for held in placed.values()))
    units = _written(placed[inputs.donor.name], placed.values(), options)
    units = [unit for unit in units if shared.issuperset(unit.targets)]
    writer = TensorWriterTask(
        out_path=str(out),
        max_shard_size=options.out_shard_size,
        safe_serialization=options.safe_serialization,
        use_async=options.async_write,
    )
    merged = _Merger(inputs, placed, options, vocabulary_names(model), units)
    saves = [
        SaveUnit(
            unit=unit,
            parts=tuple(merged.task(name) for name in unit.targets),
            writer=writer,
            clone=options.clone_tensors,
        )
        for unit in units
    ]
    return [*saves, FinalizeModel(tensor_save_tasks=tuple(saves), writer_task=writer)]


def _written(donor: Placed, inputs: Iterable[Placed], options: MergeOptions) -> list[Unit]:
    """What the result holds: as the first model, and the heads that others hold untied."""
    units = {id(unit): unit for name, unit in donor.units.items() if name not in donor.tied}
    for name, same in donor.tied.items():
        for held in inputs:
            if name in held.units.keys() - held.tied.keys() and same in held.units:
                tensors = ModelTensors(held, options)
                if not torch.equal(tensors.read(name, "cpu"), tensors.read(same, "cpu")):
                    units[id(held.units[name])] = held.units[name]
                    break
    return list(units.values())


class _Merger:
    """Makes the task that merges a tensor, with the recipe's parameters for it."""

    def __init__(
        self,
        inputs: Inputs,
        placed: Mapping[str, Placed],
        options: MergeOptions,
        vocabulary: set[str],
        units: Iterable[Unit],
    ) -> None:
        self._config = inputs.config
        names = [name for unit in units for name in unit.targets]
        self._settings = Settings(inputs, placed, names)
        named = references(inputs.config)
        self._models: dict[ModelReference, ModelTensors] = {
            model: ModelTensors(placed[label], options) for label, model in named.items()
        }
        self._donor = named[inputs.donor.name]
        self._computed = placed[inputs.donor.name].computed
        self._device = str(options.device or "cpu") if options.read_to_gpu else "cpu"
        self._vocabulary = vocabulary

    def task(self, name: str) -> Task:
        """Merges the tensor of a name."""
        if name in self._computed:
            return self._load(self._models[self._donor], name, None)
        if not any(model.is_floating(name) for model in self._models.values()):
            kept = tuple(self._load(model, name, None) for model in self._models.values())
            return KeepTensor(loads=kept, models=tuple(map(str, self._models)), name=name)
        shared, per_model = self._settings.of(name)
        loads = {
            model: self._load(source, name, self._config.dtype)
            for model, source in self._models.items()
        }
        return ExecuteMergeMethodTask(
            method_name=self._settings.method.spec.name,
            gather_tensors=TensorDictWrapper(tensors=loads),
            model_order=tuple(self._models),
            base_model=self._config.base_model,
            output_weight=WeightInfo(
                name=name, vocabulary_axis=0 if name in self._vocabulary else None
            ),
            parameters=shared,
            input_parameters=per_model,
            dtype=self._config.dtype,
            out_dtype=self._config.out_dtype,
        )

    def _load(self, source: ModelTensors, name: str, dtype: str | None) -> Task:
        return LoadModelTensor(source=source, name=name, dtype=dtype, device=self._device)
