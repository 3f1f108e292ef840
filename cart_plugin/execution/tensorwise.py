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

from cart_plugin.checkpoints.names import Unit
from cart_plugin.doctor.layout import references
from cart_plugin.errors import CartError
from cart_plugin.execution.inputs import Inputs
from cart_plugin.execution.layout import (
    Placed,
    check_alike,
    check_described,
    donor_model,
    place,
    values,
    vocabulary_names,
)
from cart_plugin.execution.settings import Settings


class ModelTensors:
    """One input's tensors by the model's names, read when asked for."""

    def __init__(self, placed: Placed, options: MergeOptions) -> None:
        self.units = placed.units
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
    units = shared_units(inputs, placed)
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


def shared_units(inputs: Inputs, placed: Mapping[str, Placed]) -> list[Unit]:
    """What the result holds: the tensors of the first model that all others have, too."""
    shared = set.intersection(*(set(held.units) for held in placed.values()))
    units = {id(unit): unit for unit in placed[inputs.donor.name].units.values()}
    return [unit for unit in units.values() if shared.issuperset(unit.targets)]


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
        self._models: dict[ModelReference, ModelTensors] = {
            model: ModelTensors(placed[label], options)
            for label, model in references(inputs.config).items()
        }
        self._device = str(options.device or "cpu") if options.read_to_gpu else "cpu"
        self._vocabulary = vocabulary

    def task(self, name: str) -> Task:
        """Merges the tensor of a name."""
        shared, per_model = self._settings.of(name)
        loads = {
            model: LoadModelTensor(
                source=source, name=name, dtype=self._config.dtype, device=self._device
            )
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
