"""A base and an adapter, read a tensor at a time as the whole model that they make."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cart_plugin.adapters.inputs import Adapter, Shape, find, open_adapters
from cart_plugin.checkpoints import names
from cart_plugin.checkpoints.adapters import plain_name
from cart_plugin.checkpoints.digests import state
from cart_plugin.checkpoints.orientation import turned_parameters
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.errors import CartError
from cart_plugin.merging.spans import Difference
from cart_plugin.merging.tensors import matrix_shape

_WHOLE = "merge it into its base first (PEFT's merge_and_unload, then save_pretrained)"


class _Place(NamedTuple):
    """A tensor that an adapter changes."""

    module: str  # by PEFT's name
    shape: Shape
    turned: bool  # stored as (inputs, outputs)


class Fused(Checkpoint):
    """The base's tensors with the adapter's differences added, in fp32 or better.

    Attributes:
        base: the base.
        adapter: the adapter.
    """

    def __init__(self, base: Checkpoint, adapter: str, name: str) -> None:
        """Find the adapter's places in the base.

        Args:
            base: the base.
            adapter: the adapter's folder, or its name on the hub.
            name: what errors call the model.

        Raises:
            CartError: it is no plain LoRA, or does not fit the base.
        """
        self.base = base
        self.adapter: Adapter
        (self.adapter,) = open_adapters(find([adapter]), [name])
        if base.path.is_file():
            raise CartError(
                f"{base.path} is a weight file: an adapter's base is known by its folder with "
                "config.json; name that"
            )
        super().__init__(name, base.path, base.config, dict(base.tensors), list(base.files))
        model = names.meta_model(base.path, base.config, base.name)
        shapes = {tensor: info.shape for tensor, info in base.tensors.items()}
        self._sources = names.plain_sources(model, shapes)
        stored_turned = turned_parameters(model)
        for whole in self.adapter.whole.values():
            self.tensors[self._stored(plain_name(whole))] = self.adapter.checkpoint.tensors[whole]
        self._places: dict[str, _Place] = {}
        self._biases: dict[str, _Place] = {}
        for module, layer in self.adapter.layers.items():
            plain = plain_name(module)
            if layer.shape.kind == "experts":
                raise CartError(
                    f"adapter {name} changes parameters of {plain} (target_parameters), and its "
                    f"file does not say which; {_WHOLE}"
                )
            turned = layer.shape.kind == "embedding" or f"{plain}.weight" in stored_turned
            place = _Place(module, layer.shape, turned)
            self._places[self._stored(f"{plain}.weight", place)] = place
            if layer.factors.bias is not None:
                self._biases[self._stored(f"{plain}.bias")] = place

    def _stored(self, name: str, place: _Place | None = None) -> str:
        """The name in the base's file of a tensor by the model's name.

        Raises:
            CartError: the base does not have it as it is, or in another shape.
        """
        found = self._sources.get(name)
        if found is None:
            raise CartError(
                f"adapter {self.name} changes {name}, which {self.base.path} does not hold as one "
                f"tensor; name the base that it was trained on, or {_WHOLE}"
            )
        if place is not None:
            m, n, shape = place.shape.m, place.shape.n, self.tensors[found].shape
            held = (math.prod(shape[:1]), math.prod(shape[1:]))
            if held != ((n, m) if place.turned else (m, n)):
                raise CartError(
                    f"adapter {self.name} does not fit {self.base.path}: {found} is {shape} there, "
                    f"and it changes {place.shape}; name the base that it was trained on"
                )
        return found

    def read(self, name: str) -> Tensor:
        """See `Checkpoint`.

        Raises:
            CartError: as there; or the adapter holds NaN or infinite values.
        """
        found = super().read(name)
        place = self._places.get(name)
        if place is not None:
            wide = found.to(torch.promote_types(found.dtype, torch.float32))
            difference = self._difference(place)
            return wide + (difference.left @ difference.right).reshape(wide.shape)
        place = self._biases.get(name)
        bias = None if place is None else self.adapter.bias(place.module, place.shape)
        return found if bias is None else found + bias

    def difference(self, name: str) -> Difference | None:
        """What the adapter changes of a matrix, as factors of the matrix that is stored.

        Returns:
            None where it is not known as factors.

        Raises:
            CartError: as `read`.
        """
        info = self.tensors[name]
        if len(info.shape) < 2 or info is not self.base.tensors[name]:
            return None
        stack, m, n = matrix_shape(name, info.shape)
        if (place := self._places.get(name)) is None:
            return Difference(torch.zeros(stack, m, 1), torch.zeros(stack, 1, n))
        found = self._difference(place)
        whole = (*found.left.shape[:2], found.right.shape[2])
        return found if whole == (stack, m, n) else None

    def _difference(self, place: _Place) -> Difference:
        found = self.adapter.difference(place.module, place.shape, torch.float32)
        return Difference(found.right.mT, found.left.mT) if place.turned else found

    def identity(self) -> str:
        """What changes when the base or the adapter does, or what is known of how it is stored."""
        config = sorted(map(str, self.adapter.checkpoint.config.items()))
        places = sorted((self._places | self._biases).items())
        return f"{state(self.base)} {state(self.adapter.checkpoint)} {config} {places}"
