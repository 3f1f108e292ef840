"""Adapters of one base, by their factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cart_plugin.adapters.agreement import Plan, agree, lacking_notes
from cart_plugin.adapters.inputs import find, open_adapters
from cart_plugin.checkpoints import adapters as tensors
from cart_plugin.checkpoints.digests import state
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.errors import CartError
from cart_plugin.inspect.activations import Subject
from cart_plugin.inspect.sources import cached, open_model
from cart_plugin.inspect.weights import Plain, Weight, of_factors
from cart_plugin.linalg.gram import total_energy
from cart_plugin.wording import some


class Adapters:
    """LoRA adapters of one base, of which no whole weight is read but for its norm."""

    of_adapters = True

    def __init__(
        self,
        adapters: Sequence[str],
        paths: list[str],
        names: Sequence[str],
        base: str | None,
        merged: str | None,
    ) -> None:
        """Open them.

        Args:
            adapters: their folders.
            paths: the same as they are written, perhaps with their base.
            names: what errors call them.
            base: their base, if it is known.
            merged: an adapter that is judged.

        Raises:
            CartError: they are no adapters of one base.
        """
        self.paths, self.start = paths, base
        opened = open_adapters(find(adapters), names)
        own = agree(opened, base)
        if merged is not None:
            opened += open_adapters(find([merged]), ["the merged adapter"])
        self.plan: Plan = agree(opened, base)
        by_name = {adapter.name: adapter for adapter in self.plan.adapters}
        self._adapters = [by_name[name] for name in names]
        self._merged = None if merged is None else by_name["the merged adapter"]
        self.notes = list(lacking_notes(own))
        if own.whole:
            self.notes.append(
                f"what the adapters hold whole ({some(own.whole.values())}) is left out, since the "
                "base's are not compared"
            )
        self._base = None
        if base is not None and cached(base).is_dir():  # else its name serves recipes alone
            self._base = open_model(base, "the base model")
        elif base is not None:
            self.notes.append(
                f"the base {base} is not here: how large its weights are, of which the adapters "
                "moved a share, is not known"
            )
        if own.has_bias:
            self.notes.append(
                "biases that the adapters add (lora_bias) are left out: weights alone are measured"
            )
        self._modules = {
            f"{tensors.plain_name(module)}.weight": module for module in self.plan.shapes
        }
        self.weights = list(self._modules)
        self._stored: dict[str, str] = {}
        if self._base is not None:
            self._find(self._base)
        held = [] if self._base is None else [*self._base.tensors]
        self.every = list(dict.fromkeys([*self.weights, *held]))

    def size(self, name: str) -> int:
        """See `Source`."""
        shape = self.plan.shapes[self._modules[name]]
        return shape.stack * shape.m * shape.n

    def read(self, name: str, shares: Sequence[float] | None = None) -> Weight | Plain:
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
            shares,
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

    def _find(self, base: Checkpoint) -> None:
        """Find the weights in the base, by their names or such as end in them.

        Raises:
            CartError: one is there in another shape: it is another base.
        """
        for name, module in self._modules.items():
            held = [name] if name in base.tensors else _ending(base, name)
            fitting = [own for own in held if _fits(base.tensors[own].shape, self.plan, module)]
            if held and not fitting:
                raise CartError(
                    f"the base {self.start} is not that of the adapters: {held[0]} is "
                    f"{base.tensors[held[0]].shape} there, and they change "
                    f"{self.plan.shapes[module]}; name the base that they were trained on"
                )
            if len(fitting) == 1:
                self._stored[name] = fitting[0]
        lacking = [name for name in self.weights if name not in self._stored]
        if lacking:
            self.notes.append(
                f"{len(lacking):,} of {len(self.weights):,} weights that the adapters change, such "
                f"as {lacking[0]}, are not told apart by their names in the base {self.start}: how "
                "large its weights are, of which the adapters moved a share, is not known"
            )

    def _norm(self, name: str) -> Tensor | None:
        """The squared norm of the base's weight; None where it is not known."""
        found = self._stored.get(name)
        if self._base is None or found is None:
            return None
        weight = self._base.read(found)
        flat = weight.reshape(1, weight.shape[0], -1)
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
            Subject(name, base, folder, True, [folder, base])
            for name, folder in zip(self.models, folders, strict=True)
        ]

    def identity(self) -> list[str]:
        """See `Source`."""
        held = [*self._adapters, *([] if self._merged is None else [self._merged])]
        found = []
        for adapter in held:
            config = adapter.checkpoint.config
            found.append(f"{state(adapter.checkpoint)} {sorted(map(str, config.items()))}")
        return [
            *found,
            str(self._merged is not None),
            "" if self._base is None else state(self._base),
        ]


def _ending(base: Checkpoint, name: str) -> list[str]:
    return [own for own in base.tensors if own.endswith(f".{name}")]


def _fits(shape: Sequence[int], plan: Plan, module: str) -> bool:
    """Whether a base's weight may be one that is changed, however it is turned."""
    own = plan.shapes[module]
    if own.stack > 1:
        return math.prod(shape) == own.stack * own.m * own.n
    return len(shape) > 1 and sorted((shape[0], math.prod(shape[1:]))) == sorted((own.m, own.n))
