"""The models that are inspected: found, opened (headers only), and read a weight at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cart_plugin.adapters.agreement import Plan, agree, lacking_notes
from cart_plugin.adapters.inputs import find, open_adapters
from cart_plugin.checkpoints import adapters as tensors
from cart_plugin.checkpoints.agreement import check_stored, strangers
from cart_plugin.checkpoints.digests import digest
from cart_plugin.checkpoints.headers import read_header
from cart_plugin.checkpoints.labels import told_apart
from cart_plugin.checkpoints.reading import (
    ADAPTER_CONFIG,
    CONFIG,
    Checkpoint,
    open_folder,
)
from cart_plugin.errors import CartError, CheckpointError
from cart_plugin.inspect.activations import Subject
from cart_plugin.inspect.measures import place
from cart_plugin.inspect.weights import Plain, Weight, of_factors, of_tensors
from cart_plugin.linalg.gram import total_energy


@dataclass(frozen=True)
class Named:
    """A model as it is written: a folder, or a base and an adapter.

    Attributes:
        path: of the whole model; None for an adapter alone.
        adapter: of the adapter; None for a whole model.
    """

    path: str | None
    adapter: str | None = None

    @classmethod
    def parse(cls, text: str) -> Named:
        """Read ``MODEL``, ``ADAPTER`` or ``BASE+ADAPTER``; a folder with a plus is a folder."""
        if not os.path.exists(text) and "+" in text:
            base, _, adapter = text.partition("+")
            return cls(base, adapter)
        folder = Path(text)
        if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file():
            return cls(None, text)
        return cls(text)

    def __str__(self) -> str:
        return "+".join(part for part in (self.path, self.adapter) if part is not None)


class Source(Protocol):
    """Models of one kind, read a weight at a time.

    Attributes:
        notes: what a user has to know.
        weights: names of the weights, in order.
    """

    notes: list[str]
    weights: list[str]

    @property
    def models(self) -> list[str]:
        """Their names."""

    @property
    def has_base(self) -> bool:
        """Whether differences are from a base model."""

    def read(self, name: str) -> Weight | Plain:
        """What the models make of a weight.

        Raises:
            CartError: it cannot be read, or is none that can be merged.
        """

    def runnable(self) -> list[Subject]:
        """The models as they can be run.

        Raises:
            CartError: one cannot.
        """

    def identity(self) -> list[str]:
        """What changes when the models do.

        Raises:
            CartError: a file cannot be read.
        """


def open_models(
    named: Sequence[Named], base: str | None, merged: str | None, names: Sequence[str] | None
) -> Source:
    """Open models that are to be compared.

    Args:
        named: two or more, all whole or all adapters.
        base: what they were fine-tuned from; of adapters, that of ``BASE+ADAPTER`` if None.
        merged: a merged model, or of adapters a merged adapter.
        names: what to call them; by their folders if None.

    Raises:
        CartError: they cannot be read, or not be compared.
    """
    if len(named) < 2:
        raise CartError(
            f"inspect compares two models or more, got {len(named)}; name the others, too"
        )
    adapters = [model.adapter for model in named if model.adapter is not None]
    paths = adapters if len(adapters) == len(named) else [str(model) for model in named]
    chosen = list(names) if names is not None else told_apart(paths)
    if len(chosen) != len(named):
        raise CartError(f"{len(named)} models but {len(chosen)} names")
    for name in chosen:
        if chosen.count(name) > 1:
            raise CartError(f"two models are called {name!r}; name each once, or give names")
    if not adapters:
        return Whole(
            [_open(str(model.path), name) for model, name in zip(named, chosen, strict=True)],
            None if base is None else _open(base, "the base model"),
            None if merged is None else _open(merged, "the merged model"),
        )
    if len(adapters) < len(named):
        whole = next(model for model in named if model.adapter is None)
        raise CartError(
            f"{whole} is a whole model and {adapters[0]} an adapter, and they are not compared "
            "with each other; name adapters only, or merge each into its base first "
            "(`mergekit-cart merge` with `merge_method: passthrough`)"
        )
    bases = {os.path.realpath(model.path): model.path for model in named if model.path}
    if len(bases) > 1:
        first, other = list(bases.values())[:2]
        raise CartError(
            f"adapters of {first} and of {other} cannot be compared: theirs are different bases"
        )
    return Adapters(adapters, chosen, base or next(iter(bases.values()), None), merged)


def _open(path: str, name: str) -> Checkpoint:
    """A model's headers.

    Raises:
        CartError: it is no model, or quantised.
    """
    folder = Path(path)
    if folder.is_file() and folder.suffix == ".safetensors":
        model = Checkpoint(name, folder, {}, read_header(folder, f"model {name}"), [folder])
    elif (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{path} is an adapter, and the others are whole models",
            "name adapters only, or merge it into its base first",
        )
    else:
        model = open_folder(folder if folder.exists() else _cached(path), name)
    check_stored([model])
    return model


def _cached(path: str) -> Path:
    """The folder of a model that the hub's cache holds, or the path as it is."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return Path(path)


@dataclass
class Whole:
    """Whole models of one architecture."""

    checkpoints: list[Checkpoint]
    base: Checkpoint | None
    merged: Checkpoint | None
    weights: list[str] = field(init=False)
    notes: list[str] = field(init=False)

    def __post_init__(self) -> None:
        others = [model for model in (self.base, self.merged) if model is not None]
        first, every = self.checkpoints[0], [*self.checkpoints, *others]
        if odd := strangers(first, every[1:]):
            raise CartError(
                f"{odd[0].name} lacks most tensors by the names of {first.name} "
                f"({next(iter(first.tensors))}, say): they are of different architectures, or "
                "saved with different classes"
            )
        floating = [name for name, info in first.tensors.items() if info.is_floating]
        self.weights, lacking, unlike = [], [], []
        for name in floating:
            held = [model.tensors.get(name) for model in every]
            if any(info is None or not info.is_floating for info in held):
                lacking.append(name)
            elif len({info.shape for info in held if info is not None}) > 1:
                unlike.append(name)
            else:
                self.weights.append(name)
        self.notes = list(self._left_out(every, lacking, unlike))
        if not self.weights:
            raise CartError("the models have no tensor in common")

    def _left_out(
        self, every: Sequence[Checkpoint], lacking: Sequence[str], unlike: Sequence[str]
    ) -> Iterator[str]:
        first = every[0]
        for name in unlike:
            other = next(m for m in every if m.tensors[name].shape != first.tensors[name].shape)
            shapes = (
                f"{name} is {tuple(first.tensors[name].shape)} in {first.name} and "
                f"{tuple(other.tensors[name].shape)} in {other.name}"
            )
            if place(name)[0] is not None:
                raise CartError(f"{shapes}: models of different shapes cannot be merged")
            yield f"{shapes}: left out, as heads and vocabularies of different sizes have to be"
        if lacking:
            yield (
                f"{len(lacking):,} tensors are not in all of the models, such as {lacking[0]}: "
                "left out"
            )

    @property
    def models(self) -> list[str]:
        """Their names."""
        return [model.name for model in self.checkpoints]

    @property
    def has_base(self) -> bool:
        """Whether one is given."""
        return self.base is not None

    def read(self, name: str) -> Weight | Plain:
        """See `Source`."""
        return of_tensors(
            name,
            [model.read(name) for model in self.checkpoints],
            self.models,
            None if self.base is None else self.base.read(name),
            None if self.merged is None else self.merged.read(name),
        )

    def runnable(self) -> list[Subject]:
        """See `Source`."""
        found = []
        for model in self.checkpoints:
            if model.path.is_file():
                raise CartError(
                    f"{model.name} is a weight file, which cannot be run on inputs: name its folder"
                )
            side = [model.path, *([] if self.base is None else [self.base.path])]
            found.append(Subject(model.name, model.path, None, side))
        return found

    def identity(self) -> list[str]:
        """See `Source`."""
        every = (*self.checkpoints, self.base, self.merged)
        return ["" if model is None else digest(model) for model in every]


class Adapters:
    """LoRA adapters of one base, of which no whole weight is read but for its norm."""

    def __init__(
        self, paths: Sequence[str], names: Sequence[str], base: str | None, merged: str | None
    ) -> None:
        """Open them.

        Raises:
            CartError: they are no adapters of one base.
        """
        opened = open_adapters(find(paths), names)
        own = agree(opened, base)
        if merged is not None:
            if (Path(merged) / CONFIG).is_file():
                raise CartError(
                    f"{merged} is a whole model, and the others are adapters: name the merged "
                    "adapter, or the whole models"
                )
            opened += open_adapters(find([merged]), ["the merged adapter"])
        self.plan: Plan = agree(opened, base)
        by_name = {adapter.name: adapter for adapter in self.plan.adapters}
        self._adapters = [by_name[name] for name in names]
        self._merged = None if merged is None else by_name["the merged adapter"]
        self.notes = list(lacking_notes(own))
        if own.whole:
            self.notes.append(
                f"{len(own.whole):,} tensors that the adapters hold whole, such as {own.whole[0]}: "
                "left out, since the base's are not compared"
            )
        self._base = None
        if base is not None and Path(base).is_dir():
            self._base = _open(base, "the base model")
        self._modules = {
            f"{tensors.plain_name(module)}.weight": module for module in self.plan.shapes
        }
        self.weights = list(self._modules)

    def read(self, name: str) -> Weight | Plain:
        """See `Source`."""
        module = self._modules[name]
        shape = self.plan.shapes[module]
        dtype = torch.float32
        held = [*self._adapters, *([] if self._merged is None else [self._merged])]
        found = [adapter.difference(module, shape, dtype) for adapter in held]
        count = len(self._adapters)
        return of_factors(
            name,
            (shape.stack, shape.m, shape.n),
            found[:count],
            found[count] if self._merged is not None else None,
            self._norm(name),
            is_table=shape.kind == "embedding",
        )

    @property
    def models(self) -> list[str]:
        """Their names."""
        return [adapter.name for adapter in self._adapters]

    @property
    def has_base(self) -> bool:
        """What adapters hold is the difference from it, wherever it is."""
        return True

    def _norm(self, name: str) -> Tensor | None:
        """The squared norm of the base's weight; None where it is not known."""
        if self._base is None:
            return None
        held = [name, *(own for own in self._base.tensors if own.endswith(f".{name}"))]
        found = next((own for own in held if own in self._base.tensors), None)
        if found is None:
            return None
        weight = self._base.read(found)
        flat = (
            weight.reshape(1, 1, -1) if weight.ndim < 2 else weight.reshape(1, weight.shape[0], -1)
        )
        norm = float(total_energy(flat.float())[0])
        if not math.isfinite(norm):
            raise CartError(f"the base model: tensor {found!r} holds NaN or infinite values")
        return torch.tensor(norm, dtype=torch.float64)

    def runnable(self) -> list[Subject]:
        """See `Source`."""
        if self._base is None:
            raise CartError(
                "adapters are run on inputs with their base: name its folder (--base), or "
                "BASE+ADAPTER"
            )
        base = self._base.path
        folders = [adapter.checkpoint.path for adapter in self._adapters]
        return [
            Subject(name, base, folder, [folder, base])
            for name, folder in zip(self.models, folders, strict=True)
        ]

    def identity(self) -> list[str]:
        """See `Source`."""
        held = [*self._adapters, *([] if self._merged is None else [self._merged])]
        found = []
        for adapter in held:
            config = adapter.checkpoint.config
            found.append(f"{digest(adapter.checkpoint)} {sorted(map(str, config.items()))}")
        return [
            *found,
            str(self._merged is not None),
            "" if self._base is None else digest(self._base),
        ]
