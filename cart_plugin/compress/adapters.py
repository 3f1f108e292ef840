"""The adapters: each task's differences from the base as it is stored, decomposed and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from cart_plugin.checkpoints import side_files, writing
from cart_plugin.checkpoints.adapters import BASE_RECORD
from cart_plugin.checkpoints.digests import digest
from cart_plugin.checkpoints.files import check_space, write_json, write_text
from cart_plugin.checkpoints.reading import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint
from cart_plugin.compress import peft_files
from cart_plugin.compress.layers import Assignment, Layer
from cart_plugin.compress.report import Entry, Loss
from cart_plugin.compress.work import (
    ADAPTERS,
    TASK_CONFIG,
    Work,
    base_record,
    config_text,
    differences,
    exact_layout,
    minus,
    square,
    stored_dtypes,
)
from cart_plugin.errors import CartError
from cart_plugin.linalg.rules import RankRule
from cart_plugin.merging.differences import factors_of

# Short sides from which on a near best subspace takes the place of the best one.
_LARGE = 512


def write_adapters(
    work: Work,
    base: Checkpoint,
    folder: Path,
    assignment: Assignment,
    all_ranks: Sequence[Mapping[str, int]],
    task_type: str | None,
) -> None:
    """Write ``folder/adapters``, and enter sizes and losses into the report.

    Args:
        work: of this compression; its `changed` tensors are known.
        base: as it is stored.
        folder: the unfinished one.
        assignment: what becomes of each tensor.
        all_ranks: one task's ranks each, by layer: of A and B as they are stored. A layer that has
            not as many directions is padded with zeros.
        task_type: PEFT's.

    Raises:
        CartError: the disk has no room for them.
    """
    dtypes = stored_dtypes(work)
    exact = exact_layout(work, assignment)
    layouts = [
        {**peft_files.tensor_layout(assignment, chosen, dtypes), **exact} for chosen in all_ranks
    ]
    check_space(folder, sum(writing.file_bytes(layout) for layout in layouts))
    record = base_record(digest(base))
    places = [folder / ADAPTERS / task for task in work.report.tasks]
    with ExitStack() as stack:
        files = []
        for place, layout, chosen, model in zip(
            places, layouts, all_ranks, work.models, strict=True
        ):
            place.mkdir(parents=True)
            text = config_text(work, assignment, chosen, task_type)
            write_text(place / ADAPTER_CONFIG, text)
            write_text(place / BASE_RECORD, record)
            if model.config != work.described.config:
                write_json(place / TASK_CONFIG, model.config, sort_keys=True)
            kept, absent = side_files.keep(model.path, base.path, place)
            work.report.task_files.append(kept)
            work.report.absent_files.append(absent)
            opened = writing.TensorFile(place / ADAPTER_WEIGHTS, layout)
            files.append(stack.enter_context(opened))
        _fill(work, base, assignment, all_ranks, files)
    for place in places:
        written = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_RECORD)
        work.report.adapter_bytes.append(sum((place / name).stat().st_size for name in written))


def _fill(
    work: Work,
    base: Checkpoint,
    assignment: Assignment,
    all_ranks: Sequence[Mapping[str, int]],
    files: Sequence[writing.TensorFile],
) -> None:
    """Compute and write the adapters' tensors, and enter what each loses."""
    biases = {layer.bias: layer for layer in assignment.lora.values() if layer.bias is not None}
    copies: dict[str, list[str]] = {}
    for name, source in assignment.exact.items():
        copies.setdefault(source, []).append(name)
    folds = [peft_files.folded(ranks) for ranks in all_ranks]
    unused = {unit.sources[0] for unit in work.units if not unit.targets} & work.changed
    wanted = {*assignment.lora, *biases, *copies, *assignment.left, *unused}
    if assignment.has_bias:
        for file, chosen in zip(files, all_ranks, strict=True):
            _write_no_biases(work, assignment, chosen, file)
    for task, unit, name, tensor, around in differences(work, base, wanted, "decomposing"):
        dtype, file = work.dtype(unit), files[task]
        reason = assignment.left.get(name, "")
        if not tensor.is_floating_point():
            for copy in copies[name]:
                file.write(peft_files.exact_name(copy), tensor)
            continue
        loss = Loss(square(tensor), square(tensor, around))
        loss.lost = loss.difference
        if name in assignment.lora:
            kind, layer = "lora", assignment.lora[name]
            rank, fold = all_ranks[task][name], folds[task][name]
            if rank:
                delta = minus(tensor, around)
                a, b = decompose(work, layer, delta, rank, dtype, fold)
                file.write(peft_files.lora_name(layer, "A"), a)
                file.write(peft_files.lora_name(layer, "B"), b)
                loss.lost = square(delta, layer.difference(a, b).div_(fold))
        elif name in biases:
            kind = "bias"
            delta = minus(tensor, around)
            fold = folds[task][biases[name].name]
            rounded = (delta * fold).to(dtype)
            check_range(rounded, name)
            file.write(peft_files.bias_name(biases[name]), rounded)
            loss.lost = square(delta, rounded.to(delta.dtype) / fold)
        elif name in copies:
            kind = "exact"
            rounded = tensor.to(dtype)
            for copy in copies[name]:
                file.write(peft_files.exact_name(copy), rounded)
            loss.lost = 0.0 if rounded is tensor else square(tensor, rounded)
        else:
            kind = work.report.left
            reason = reason or "the model that config.json describes has no such tensor"
        if any(source in work.changed for source in unit.sources):
            entry = work.report.entries.setdefault(name, Entry(kind, tuple(tensor.shape), reason))
            entry.losses.append(loss)
            entry.bytes = tensor.numel() * dtype.itemsize
            if kind == "lora":
                entry.ranks.append(min(all_ranks[task][name], layer.full_rank))
        del tensor, around  # before the next ones are read


def _write_no_biases(
    work: Work, assignment: Assignment, chosen: Mapping[str, int], file: writing.TensorFile
) -> None:
    """Zeros for layers without a bias of their own to carry: PEFT has biases for all or none."""
    dtypes = stored_dtypes(work)
    for name, layer in assignment.lora.items():
        if chosen[name] and layer.bias is None and not layer.is_parameter:
            zeros = torch.zeros(layer.matrices[1], dtype=dtypes[name], device="cpu")
            file.write(peft_files.bias_name(layer), zeros)


def decompose(
    work: Work, layer: Layer, delta: Tensor, rank: int, dtype: torch.dtype, fold: float
) -> tuple[Tensor, Tensor]:
    """PEFT's A and B of a difference ``delta``, in ``dtype``.

    Args:
        work: of this compression.
        layer: what ``delta`` is a difference of.
        delta: in the layer's shape.
        rank: of A and B; beyond `layer.full_rank`, of linear layers only, they hold zeros.
        dtype: of A and B.
        fold: B is this much larger than the difference (`peft_files.folded`).

    Raises:
        CartError: they leave the dtype's range.
    """
    matrices, rule, options = layer.to_matrices(delta), RankRule(rank=rank), work.options
    svd = options.svd
    if svd == "auto":
        # What counts is the energy that is left out, and not which of two directions with all but
        # the same energy is kept: of large matrices a near best subspace will do.
        svd = "subspace" if layer.full_rank >= _LARGE else "fast"
    found = factors_of(matrices, rule, layer.name, svd=svd, seed=options.seed)
    a, b = layer.to_lora(replace(found, U=found.U * fold), dtype)
    for side in (a, b):  # a sum may overflow fp16
        check_range(side, layer.name)
    missing = rank - found.rank
    return (pad(a, (0, 0, 0, missing)), pad(b, (0, missing))) if missing else (a, b)


def check_range(stored: Tensor, name: str) -> None:
    """Refuse what has left its dtype's range.

    Raises:
        CartError: a number is not finite.
    """
    if not bool(torch.isfinite(stored).all()):
        raise CartError(f"tensor {name!r}: its factors leave the range of {stored.dtype}")
