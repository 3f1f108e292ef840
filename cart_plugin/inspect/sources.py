"""What models are inspected, as they are named, and how they are read a weight at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cart_plugin.checkpoints import hub
from cart_plugin.checkpoints.agreement import check_stored
from cart_plugin.checkpoints.headers import read_header
from cart_plugin.checkpoints.reading import (
    ADAPTER_CONFIG,
    CONFIG,
    Checkpoint,
    open_folder,
)
from cart_plugin.inspect.activations import Subject
from cart_plugin.inspect.weights import Plain, Weight


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
            return cls(*_parts(text))
        folder = Path(text)
        if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file():
            return cls(None, text)
        return cls(text)

    def __str__(self) -> str:
        return "+".join(part for part in (self.path, self.adapter) if part is not None)


def _parts(text: str) -> tuple[str, str]:
    """Base and adapter: at the sign between two that are here, or at the first one."""
    signs = [index for index, letter in enumerate(text) if letter == "+"]
    found = [(text[:sign], text[sign + 1 :]) for sign in signs]
    return next((parts for parts in found if all(map(os.path.exists, parts))), found[0])


class Source(Protocol):
    """Models of one kind, read a weight at a time.

    Attributes:
        notes: what a user has to know.
        weights: names of the weights, in order.
        every: names of these and of what else a model holds, as far as that is known.
        paths: where each model is, as a recipe or a command would have it.
        start: path of the base model; None without one.
        of_adapters: all are adapters, of which one adapter can be made.
    """

    notes: list[str]
    weights: list[str]
    every: list[str]
    paths: list[str]
    start: str | None
    of_adapters: bool

    @property
    def models(self) -> list[str]:
        """Their names."""

    @property
    def has_base(self) -> bool:
        """Whether differences are from a base model."""

    def size(self, name: str) -> int:
        """How many numbers a weight has."""

    def read(self, name: str, shares: Sequence[float] | None = None) -> Weight | Plain:
        """What the models make of a weight; several may be read at a time.

        Args:
            name: of the weight.
            shares: how much each model counts in merges; None for alike.

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


def open_model(path: str, name: str) -> Checkpoint:
    """A whole model's headers.

    Raises:
        CartError: it is no model, or quantised.
    """
    folder = Path(path)
    if folder.is_file() and folder.suffix == ".safetensors":
        model = Checkpoint(name, folder, {}, read_header(folder, f"model {name}"), [folder])
    else:
        model = open_folder(cached(path), name)
    check_stored([model])
    return model


def cached(path: str) -> Path:
    """The folder of a model that is here or in the hub's cache, or the path as it is."""
    return Path(path) if os.path.exists(path) else hub.cached(path) or Path(path)
