"""The shards of a merge's result, foreseen: which tensors, where, and what making them takes.

mergekit finds out while it writes; here each worker has to know its part before the first tensor
is merged. A part is a shard, or a piece of one: small models have one shard only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.common import dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, SaveTensor
from mergekit.options import MergeOptions
from mergekit.tokenizer import PermutedVocabulary, TokenizerInfo
from mergekit.tokenizer.truncate import TruncatedVocabulary

from cart_plugin.checkpoints.dtypes import DTYPES, NAMES
from cart_plugin.checkpoints.files import read_json, write_json
from cart_plugin.checkpoints.headers import TensorInfo
from cart_plugin.checkpoints.writing import Layout, as_safetensors_has_it, file_bytes
from cart_plugin.distributed import tasks, trial
from cart_plugin.doctor import costs, planning
from cart_plugin.doctor.merges import Merge
from cart_plugin.errors import CartError
from cart_plugin.execution import outlook, tensorwise
from cart_plugin.execution.inputs import Inputs
from cart_plugin.execution.tensorwise import SaveUnit

_PIECE = 64_000_000  # bytes of a piece: seconds of work, and a small loss when it is lost


@dataclass(frozen=True)
class Output:
    """A tensor of the result.

    Attributes:
        name: in the file.
        dtype: of it.
        shape: of it.
        task: the key of the task that makes it (`tasks.key`).
        bytes_read: of the inputs, counted with the first tensor of a task.
        peak: bytes of memory that the task takes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    task: str
    bytes_read: int = 0
    peak: int = 0

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A file of the result.

    Attributes:
        file: its name.
        pieces: what it holds, in the order in which mergekit writes, as workers make it.
    """

    file: str
    pieces: tuple[tuple[Output, ...], ...]

    @property
    def outputs(self) -> tuple[Output, ...]:
        """All that it holds."""
        return tuple(output for piece in self.pieces for output in piece)

    @property
    def layout(self) -> Layout:
        """What the file holds, in its own order."""
        return as_safetensors_has_it({it.name: (it.dtype, it.shape) for it in self.outputs})

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return file_bytes(self.layout)


@dataclass(frozen=True)
class Part:
    """What one worker makes at a time: tensors of one shard.

    Attributes:
        shard: their shard.
        number: of the piece, from 0.
    """

    shard: Shard
    number: int

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The tensors."""
        return self.shard.pieces[self.number]

    @property
    def name(self) -> str:
        """What messages call it."""
        count = len(self.shard.pieces)
        return self.shard.file + (f" (part {self.number + 1} of {count})" if count > 1 else "")

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return sum(output.bytes for output in self.outputs)

    @property
    def memory(self) -> int:
        """Bytes that a worker takes, at most.

        While one tensor is merged, the next one's inputs are read and the last one is written.
        """
        ahead = [it.bytes_read for it in self.outputs[1:]] + [0]
        behind = [0] + [it.bytes for it in self.outputs[:-1]]
        most = max(
            it.peak + it.bytes + after + before
            for it, after, before in zip(self.outputs, ahead, behind, strict=True)
        )
        return costs.PROGRAM_BYTES + most

    @property
    def largest(self) -> Output:
        """The tensor that needs most memory."""
        return max(self.outputs, key=lambda output: output.peak)


def parts(shards: Iterable[Shard]) -> list[Part]:
    """All that is to be made."""
    return [Part(shard, number) for shard in shards for number in range(len(shard.pieces))]


def foresee(
    targets: list[Task],
    inputs: Inputs,
    options: MergeOptions,
    tokenizer: TokenizerInfo | None,
    *,
    whole: bool,
) -> list[Shard]:
    """The shards of a merge's result, named and filled as mergekit does.

    Args:
        targets: its tasks, by `tasks.planned`.
        inputs: its models.
        options: mergekit's.
        tokenizer: by `tasks.make_tokenizer`.
        whole: whether a shard is made by one worker. Several that write into one file have to be
            on one machine: network file systems do not keep apart what two machines write.

    Raises:
        CartError: there would be nothing in them.
    """
    ordered = tasks.written_order(targets)
    pickled = 0 if options.lazy_unpickle else _pickled_bytes(inputs)
    if all(isinstance(task, SaveTensor) for task in ordered):
        outputs = _by_plan(ordered, inputs, tokenizer, pickled)
    else:
        outputs = _by_tensor(ordered, inputs, pickled)
    filled = list(_filled(outputs, options.out_shard_size))
    if not filled:
        raise CartError("the models have no tensor name in common: nothing to merge")
    count = len(filled)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    return [
        Shard(name, (tuple(held),) if whole else tuple(_pieces(held)))
        for name, held in zip(names, filled, strict=True)
    ]


def _pieces(outputs: list[Output]) -> Iterator[tuple[Output, ...]]:
    """Divide a shard; what one task makes stays together."""
    piece: list[Output] = []
    for output in outputs:
        full = sum(it.bytes for it in piece) + output.bytes > _PIECE
        if piece and full and output.task != piece[-1].task:
            yield tuple(piece)
            piece = []
        piece.append(output)
    yield tuple(piece)


def _filled(outputs: Iterable[Output], most: int) -> Iterator[list[Output]]:
    """As mergekit's `TensorWriter`: a tensor that would make a shard too large starts the next."""
    shard: dict[str, Output] = {}
    size = 0
    for output in outputs:
        if shard and 0 < most < size + output.bytes:
            yield list(shard.values())
            shard, size = {}, 0
        shard[output.name] = output
        size += output.bytes
    if shard:
        yield list(shard.values())


def _pickled_bytes(inputs: Inputs) -> int:
    """What a worker holds of pickled models, each of whose files is loaded whole."""
    files = [
        [file.stat().st_size for file in held.files if file.suffix != ".safetensors"]
        for held in inputs.checkpoints.values()
    ]
    return sum(max(sizes, default=0) for sizes in files)


def _by_plan(
    ordered: list[tasks.Save], inputs: Inputs, tokenizer: TokenizerInfo | None, pickled: int
) -> Iterator[Output]:
    for task in ordered:
        assert isinstance(task, SaveTensor)
        planned = planning.planned_tensor(task)
        held = {
            label: planning.source(planned, inputs.checkpoints[label]) for label in planned.sources
        }
        found = {label: info for label, info in held.items() if info is not None}
        if not found:
            continue
        gather: Any = task.tensor_task.gather_tensors
        loads = gather if isinstance(gather, GatherTensors) else gather.gather_tensors
        dtypes = {str(model): info.force_dtype for model, info in loads.weight_info.items()}
        cast = {
            label: TensorInfo(
                info.shape, dtype_from_name(dtypes[label] or loads.dtype) or info.dtype
            )
            for label, info in found.items()
        }
        dtype = trial.result_dtype(task.tensor_task, cast)
        if dtype is None:
            continue
        merge = Merge(planned, cast, [])
        shape = merge.shape
        if isinstance(gather, PermutedVocabulary):
            shape = _with_rows(shape, gather.vocabulary_axis, _rows(gather, tokenizer))
        elif isinstance(gather, TruncatedVocabulary):
            axis = gather.weight_info.vocabulary_axis
            shape = _with_rows(shape, axis, min(info.shape[axis] for info in found.values()))
        yield Output(
            task.tensor_name,
            dtype_from_name(task.dtype) or dtype,
            shape,
            tasks.key(task),
            sum(info.bytes for info in found.values()),
            pickled + round(costs.peak(merge, inputs.config)),
        )


def _with_rows(shape: tuple[int, ...], axis: int, rows: int) -> tuple[int, ...]:
    return (*shape[:axis], rows, *shape[axis + 1 :])


def _rows(gather: PermutedVocabulary, tokenizer: TokenizerInfo | None) -> int:
    """Rows of a table for the tokenizer that the recipe asks for."""
    assert tokenizer is not None
    multiple = gather.pad_to_multiple_of or 1
    return -(-len(tokenizer.tokenizer.get_vocab()) // multiple) * multiple


def _by_tensor(ordered: list[tasks.Save], inputs: Inputs, pickled: int) -> Iterator[Output]:
    model, placed = tensorwise.check(inputs)
    written = {name for task in ordered for name in task.unit.targets}
    merges = {
        str(merge.planned.name): merge
        for merge in outlook.foresee(inputs, model, placed, heads=written)
    }
    donor = placed[inputs.donor.name]
    for task in ordered:
        assert isinstance(task, SaveUnit)
        parts: dict[str, torch.Tensor] = {}
        read, peak = 0, pickled
        for name, made in zip(task.unit.targets, task.parts, strict=True):
            merge = merges.get(name)
            if merge is None or not merge.is_floating:  # of one model, or the same in all
                unit = donor.units[name]
                held = {source: inputs.donor.tensors[source] for source in unit.sources}
                parts[name] = unit.to_model({it: _empty(info) for it, info in held.items()})[name]
                models = 1 if merge is None else len(merge.inputs)
                read += models * sum(info.bytes for info in held.values())
            else:
                asked = dtype_from_name(inputs.config.dtype)
                cast = {
                    label: TensorInfo(info.shape, asked or info.dtype)
                    for label, info in merge.inputs.items()
                }
                parts[name] = _empty(TensorInfo(merge.shape, trial.result_dtype(made, cast)))
                read += sum(info.bytes for info in merge.inputs.values())
                peak += round(costs.peak(merge, inputs.config))
        for name, tensor in task.unit.to_checkpoint(parts).items():
            yield Output(name, tensor.dtype, tuple(tensor.shape), tasks.key(task), read, peak)
            read = 0


def _empty(info: TensorInfo) -> torch.Tensor:
    return torch.empty(info.shape, dtype=info.dtype, device="meta")


def write(file: Path, shards: list[Shard]) -> None:
    """Store a plan for other processes."""
    write_json(file, {"shards": [_plain(shard) for shard in shards]})


def _plain(shard: Shard) -> dict[str, Any]:
    pieces = [[{**vars(it), "dtype": NAMES[it.dtype]} for it in piece] for piece in shard.pieces]
    return {"file": shard.file, "pieces": pieces}


def read(file: Path) -> list[Shard]:
    """A stored plan.

    Raises:
        OSError: there is none.
    """
    return [
        Shard(
            shard["file"],
            tuple(
                tuple(
                    Output(**{**it, "dtype": DTYPES[it["dtype"]], "shape": tuple(it["shape"])})
                    for it in piece
                )
                for piece in shard["pieces"]
            ),
        )
        for shard in read_json(file)["shards"]
    ]
