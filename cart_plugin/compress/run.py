"""Compression from start to end: the base, assign, choose ranks, decompose, write."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cart_plugin.checkpoints import names as naming
from cart_plugin.checkpoints import writing
from cart_plugin.checkpoints.digests import digest
from cart_plugin.checkpoints.files import check_space, unfinished
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.compress import notes, peft_files, servers
from cart_plugin.compress.adapters import write_adapters
from cart_plugin.compress.assigning import assign
from cart_plugin.compress.base import write_base
from cart_plugin.compress.inputs import (
    check_holds,
    open_base,
    open_model,
    open_models,
    untied,
)
from cart_plugin.compress.layers import Assignment, Layer, Structure
from cart_plugin.compress.ranks import by_rule, by_size, by_size_at_one_rank
from cart_plugin.compress.rehearsal import Rehearsal
from cart_plugin.compress.report import Report
from cart_plugin.compress.work import (
    BASE,
    Progress,
    Work,
    base_record,
    checked_names,
    checked_options,
    config_text,
    differences,
    exact_layout,
    minus,
    square,
    stored_dtype,
    stored_dtypes,
)
from cart_plugin.errors import CartError
from cart_plugin.linalg.spectra import spectrum


def compress(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    names: Sequence[str] | None = None,
    base: str | Path | None = None,
    rank_ratio: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    target_size: float | None = None,
    layout: str = "peft",
    dtype: str | None = None,
    drop_small: bool = False,
    small_error: float = 0.0,
    svd: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Turn fine-tuned models into one common base and a standard PEFT adapter each.

    Writes ``out/base`` (a checkpoint that transformers loads), ``out/adapters/<name>`` (what
    `peft.PeftModel.from_pretrained(base, adapter)` loads) and ``out/report.json``. ``out`` appears
    when all is done. Of the models one tensor is in memory at a time.

    Args:
        models: two or more folders of one architecture, with safetensors.
        out: the folder to write; must not exist, or be empty and not the current one.
        names: of the adapters, without dots; those of the models' folders if None, with "_" for
            dots.
        base: folder of a model of the same architecture that is to be the base, such as the
            pretrained one (the paper's uncentred ablation); the models' average if None.
        rank_ratio: share of the singular directions that each matrix keeps (`RankRule`); 0.08 if
            neither it nor any of the next three is given.
        rank: their number instead.
        energy: as many as hold this share of the squared singular values instead.
        target_size: share of the models' bytes for base and adapters together instead: directions
            are kept where they lower the total squared error most per byte.
        layout: "peft" stores what PEFT can load, which loses the least: norms, biases, embeddings
            and heads whole, and of every layer as many directions as the rule says. "servers"
            stores what vLLM, SGLang and llama.cpp load, too: A and B of linear layers alone, all of
            one rank, the largest that the rule says for one of them. All else stays as the base has
            it, and the report lists it. Shorter factors are padded with zeros; the size counts
            them.
        dtype: of base and adapters, one of `checkpoints.dtypes.STORED`; the models' own if None.
        drop_small: leave norms, biases, embeddings, heads and all else that is no decomposed matrix
            as the base has it, rather than storing it exactly.
        small_error: leave those of them whose difference from the base is at most this share of the
            task's tensor (Frobenius norms), in every task. A module that PEFT stores whole is
            stored if any tensor that needs it exceeds that; biases of decomposed layers decide
            one by one.
        svd: solver (`cart_plugin.linalg.svd.SOLVERS`); `auto` is `subspace` for matrices whose
            short side is 512 or more, whose squared error is then up to a few thousandths above
            the least, and `fast` for others.
        seed: of the solver.
        progress: is told how far the work is.

    Returns:
        Sizes and errors.

    Raises:
        CartError: input that cannot be compressed; the message says what to do.
    """
    started = time.perf_counter()
    options = checked_options(
        rank_ratio, rank, energy, target_size, layout, dtype, drop_small, small_error, svd, seed
    )
    paths = [Path(model) for model in models]
    chosen = checked_names(paths, names)
    folders = open_models(paths, chosen)
    first = folders[0]
    given = None if base is None else open_base(Path(base), first)
    described = given or first
    meta = naming.meta_model(described.path, described.config, described.name)
    shapes = {name: stored.shape for name, stored in first.tensors.items()}
    units = naming.units(meta, shapes)
    if given is not None:
        _check_more(given, first, meta)
    everyone = folders if given is None else [*folders, given]
    own_heads = untied(everyone, meta, units)
    if own_heads:
        meta = naming.meta_model(described.path, described.config, described.name)
        units = naming.units(meta, shapes)
    targets = [target for unit in units for target in unit.targets]
    tensors = {
        source: (stored_dtype(folders, source, options.dtype), shapes[source])
        for unit in units
        for source in unit.sources
    }
    center: Literal["average", "base"] = "average" if given is None else "base"
    total = sum(folder.bytes for folder in folders)
    report = Report(Path(out), chosen, center, options.layout, models_bytes=total)
    work = Work(
        folders,
        given,
        options,
        units,
        Structure(meta, targets),
        tensors,
        progress or (lambda *_: None),
        report,
    )
    if names is None:
        notes.of_names(report, paths)
    notes.of_configs(work)
    notes.of_weights(work, own_heads)
    with unfinished(Path(out)) as folder:
        check_space(folder, writing.file_bytes(tensors))
        with _timed(report, center):
            write_base(work, folder / BASE)
        stored = open_model(folder / BASE, "base")
        report.base_bytes = stored.bytes
        architecture = described.config["architectures"][0]
        task_type = peft_files.task_type(architecture)
        with torch.device("cpu"):  # whose small models take torch's default device else
            assignment = _assign(work, stored, meta, task_type)
        with _timed(report, "choose ranks"):
            all_ranks = _ranks(work, stored, assignment, task_type)
        report.loaders = servers.loaders(work.structure, assignment, all_ranks, architecture)
        with _timed(report, "decompose"):
            write_adapters(work, stored, folder, assignment, all_ranks, task_type)
        notes.of_left(report)
        notes.of_silent(report)
        notes.of_files(report)
        if report.share >= 1:
            report.notes.append(
                f"base and adapters take {report.share:.0%} of the models' bytes, saving none: "
                "keep fewer directions (rank_ratio, rank, energy), or leave out what is stored "
                "whole (drop_small, small_error)"
            )
        report.seconds["total"] = time.perf_counter() - started
        report.write(folder)
    return report


@contextmanager
def _timed(report: Report, step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    report.seconds[step] = time.perf_counter() - start


def _check_more(base: Checkpoint, first: Checkpoint, meta: Any) -> None:
    """Refuse tensors of a base that its class has a place for and the fine-tuned models lack.

    What has no place is left out: older checkpoints hold buffers, such as rotary frequencies, that
    transformers neither reads nor writes any more.
    """
    shapes = {name: stored.shape for name, stored in base.tensors.items()}
    apart = copy.copy(meta)  # it keeps how the tensors are named, and these are the base's
    placed = (unit.sources for unit in naming.units(apart, shapes) if unit.targets)
    check_holds(first, {source for sources in placed for source in sources}, base)


def _assign(work: Work, base: Checkpoint, meta: Any, task_type: str | None) -> Assignment:
    """What becomes of the tensors that differ, as far as PEFT can hold it."""
    changed = {
        target
        for unit in work.units
        for target in unit.targets
        if any(source in work.changed for source in unit.sources)
    }
    if not changed:
        held = "the same" if work.given is None else "the base's"
        raise CartError(f"the models hold {held} weights: there is nothing to compress")
    for_servers = work.options.layout == "servers"
    unfit = servers.unfit_modules(work.structure) if for_servers else {}
    trials = Rehearsal(meta, work.structure, task_type, work.progress, one_rank=for_servers)
    errors: dict[str, float] = {}
    while True:
        found = assign(
            work.structure,
            changed,
            drop_small=work.options.drop_small,
            small_error=work.options.small_error,
            errors=errors,
            refused={**unfit, **trials.layers},
            unsaved=trials.saved,
            as_parameters=trials.as_parameters,
        )
        unknown = found.beside - errors.keys()
        if work.options.small_error and unknown:
            errors |= _errors(work, base, unknown)
            continue
        if not found.lora:
            if trials.layers:
                module, why = next(iter(trials.layers.items()))
                raise CartError(
                    f"PEFT's LoRA works for none of the matrices in which the models differ, such "
                    f"as {module}: {why}"
                )
            here = (
                " in a linear layer's weights, all that the layout servers holds (GPT-2's Conv1D "
                "layers, convolutions and experts are none); the layout peft is for PEFT alone"
            )
            raise CartError(
                "the models differ in no matrix that LoRA can hold" + (here if for_servers else "")
            )
        if trials.accepts(found):
            break
    work.report.notes += trials.notes(found)
    if for_servers:
        found.left = {name: servers.why_left(work.structure, name) for name in found.left}
    with_bias = [layer.bias is not None for layer in found.lora.values()]
    state = work.structure.state
    if any(with_bias) and any(f"{layer.module}.bias" not in state for layer in found.lora.values()):
        work.report.notes.append(
            "some layers have biases and some have none: the adapters load and switch, but PEFT "
            "refuses to merge them (merge_and_unload); `mergekit-cart expand` merges, and adapters "
            "made with --drop-small can be merged by PEFT"
        )
    return found


def _errors(work: Work, base: Checkpoint, names: set[str]) -> dict[str, float]:
    """Relative differences of tensors from the base (Frobenius), the largest of all tasks."""
    largest = dict.fromkeys(names, 0.0)
    for _, _, name, tensor, around in differences(work, base, names, "measuring"):
        difference, weight = square(tensor, around), square(tensor)
        if difference:
            error = math.sqrt(difference / weight) if weight else math.inf
            largest[name] = max(largest[name], error)
    return largest


def _ranks(
    work: Work, base: Checkpoint, assignment: Assignment, task_type: str | None
) -> list[dict[str, int]]:
    """One task's ranks each, by layer."""
    rule, for_servers = work.options.rule, work.options.layout == "servers"
    layers = list(assignment.lora.values())
    spectra: list[dict[str, Tensor]] = [{} for _ in work.models]
    if rule is None or rule.energy is not None:
        wanted = set(assignment.lora)
        for task, _, name, tensor, around in differences(work, base, wanted, "spectra"):
            delta = minus(tensor, around)
            layer = assignment.lora[name]
            spectra[task][name] = spectrum(layer.to_matrices(delta))
    if rule is not None:
        by_layer = [by_rule(layers, rule, found) for found in spectra]
        return _stored(work, layers, by_layer)
    dtypes = stored_dtypes(work)
    exact = exact_layout(work, assignment)

    record = len(base_record(digest(base)).encode())

    def size(chosen: Sequence[Mapping[str, int]]) -> int:
        total = work.report.base_bytes
        for task_ranks in _stored(work, layers, chosen):
            layout = {**peft_files.tensor_layout(assignment, task_ranks, dtypes), **exact}
            text = config_text(work, assignment, task_ranks, task_type)
            total += writing.file_bytes(layout) + len(text.encode()) + record
        return total

    assert work.options.target_size is not None
    target = int(work.options.target_size * work.report.models_bytes)
    sizes = {layer.name: dtypes[layer.name].itemsize for layer in layers}
    choose = by_size_at_one_rank if for_servers else by_size
    chosen = choose(layers, spectra, sizes, size, target)
    if size(chosen) > target:
        raise CartError(
            f"the base and what is stored exactly take {size(chosen):,} bytes alone, but "
            f"target_size={work.options.target_size:g} allows {target:,}; give a larger one"
        )
    return _stored(work, layers, chosen)


def _stored(
    work: Work, layers: Collection[Layer], chosen: Sequence[Mapping[str, int]]
) -> list[dict[str, int]]:
    """The ranks of A and B in the files of the layout, from those that are chosen."""
    if work.options.layout == "servers":
        return servers.one_rank(chosen)
    return [peft_files.not_empty(layers, ranks) for ranks in chosen]
