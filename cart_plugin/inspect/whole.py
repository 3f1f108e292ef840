"""Whole models of one architecture, some of them perhaps a base and an adapter."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cart_plugin.checkpoints.agreement import strangers
from cart_plugin.checkpoints.digests import state
from cart_plugin.checkpoints.orientation import not_told, turned_weights
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.errors import CartError
from cart_plugin.inspect.activations import Subject
from cart_plugin.inspect.fused import Fused
from cart_plugin.inspect.places import layers, place
from cart_plugin.inspect.weights import Plain, Weight, of_tensors
from cart_plugin.merging.spans import Difference


@dataclass
class Whole:
    """Whole models of one architecture; see `cart_plugin.inspect.sources.Source`.

    Attributes:
        checkpoints: the models.
        base: the base model; None without one.
        merged: a merged model, which is judged.
    """

    of_adapters = False

    checkpoints: list[Checkpoint]
    base: Checkpoint | None
    merged: Checkpoint | None
    paths: list[str]
    start: str | None
    weights: list[str] = field(init=False)
    every: list[str] = field(init=False)
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
        for other in every[1:]:
            _check_depths(first, other)
        self.every = list(first.tensors)
        self.weights, lacking, unlike = [], [], []
        for name in dict.fromkeys(name for model in self.checkpoints for name in model.tensors):
            held = [model.tensors.get(name) for model in every]
            if not any(info.is_floating for info in held if info is not None):
                continue
            if any(info is None or not info.is_floating for info in held):
                lacking.append(name)
            elif len({info.shape for info in held if info is not None}) > 1:
                unlike.append(name)
            else:
                self.weights.append(name)
        self.notes = list(self._left_out(every, lacking, unlike))
        if not self.weights:
            raise CartError("the models have no tensor in common")
        self._turned: set[str] | None = None  # nobody knows
        try:
            self._turned = turned_weights(first)
        except CartError as error:
            self.notes.append(not_told(error))

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
            if place(name).layer is not None:
                raise CartError(f"{shapes}: models of different shapes cannot be merged")
            yield (
                f"{shapes}: left out, as heads of different sizes have to be; of vocabularies "
                "mergekit makes one with `tokenizer: {source: union}` in the recipe"
            )
        if lacking:
            what = "tensors are" if len(lacking) > 1 else "tensor is"
            yield (
                f"{len(lacking):,} {what} not in all of the models, such as {lacking[0]}: left out"
            )

    @property
    def models(self) -> list[str]:
        """Their names."""
        return [model.name for model in self.checkpoints]

    @property
    def has_base(self) -> bool:
        """Whether one is given."""
        return self.base is not None

    def size(self, name: str) -> int:
        """See `Source`."""
        return math.prod(self.checkpoints[0].tensors[name].shape)

    def read(self, name: str, shares: Sequence[float] | None = None) -> Weight | Plain:
        """See `Source`."""
        return of_tensors(
            name,
            [model.read(name) for model in self.checkpoints],
            self.models,
            None if self.base is None else self.base.read(name),
            None if self.merged is None else self.merged.read(name),
            shares,
            dict(self._differences(name)),
            turned=name in (self._turned or ()),
        )

    def _differences(self, name: str) -> Iterator[tuple[int, Difference]]:
        """What is known by factors, by the models' numbers: adapters of the very base."""
        if self.base is None:
            return
        start = os.path.realpath(self.base.path)
        for index, model in enumerate(self.checkpoints):
            if isinstance(model, Fused) and os.path.realpath(model.base.path) == start:
                found = model.difference(name)
                if found is not None:
                    yield index, found

    def runnable(self) -> list[Subject]:
        """See `Source`."""
        found = []
        for model in self.checkpoints:
            if model.path.is_file():
                raise CartError(
                    f"{model.name} is a weight file, which cannot be run on inputs: name its folder"
                )
            adapter = model.adapter.checkpoint.path if isinstance(model, Fused) else None
            side = [] if adapter is None else [adapter]
            side += [model.path, *([] if self.base is None else [self.base.path])]
            found.append(Subject(model.name, model.path, adapter, False, side))
        return found

    def identity(self) -> list[str]:
        """See `Source`."""
        every = (*self.checkpoints, self.base, self.merged)
        # How weights are stored, the config and transformers tell, and not the weights' files.
        stored = "not told" if self._turned is None else f"turned {sorted(self._turned)}"
        return [*("" if model is None else _identity(model) for model in every), stored]


def _check_depths(one: Checkpoint, other: Checkpoint) -> None:
    """Refuse models of which one has more layers, of which a part would be compared.

    A layer of another kind at the end is none that counts, such as the one that DeepSeek predicts
    further tokens by: transformers leaves it out when it saves a model.

    Raises:
        CartError: they are of different depths.
    """
    held = {model.name: layers(model.tensors) for model in (one, other)}
    for name, lacking in ((one.name, other.name), (other.name, one.name)):
        for stack, own in held[name].items():
            there = held[lacking].get(stack, {})
            kinds = set().union(*(own[layer] for layer in own if layer in there))
            if any(layer not in there and modules <= kinds for layer, modules in own.items()):
                raise CartError(
                    f"{name} has {len(own)} layers in {stack} and {lacking} {len(there)}: models "
                    "of different shapes cannot be merged"
                )


def _identity(model: Checkpoint) -> str:
    return model.identity() if isinstance(model, Fused) else state(model)
