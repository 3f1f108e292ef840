"""An adapter that `compress` has written, read back: whole, and as PEFT would read it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cart_plugin.checkpoints.reading import Checkpoint, open_adapter
from cart_plugin.compress import peft_files
from cart_plugin.compress.layers import Layer, Structure, nested
from cart_plugin.errors import CheckpointError
from cart_plugin.merging.inputs import check_finite, check_range
from cart_plugin.wording import some

_AGAIN = "copy it again from where `compress` wrote it, or compress the models again"
# What `compress` never writes, and PEFT would make another model of.
_UNUSED = (
    *("use_rslora", "use_dora", "alpha_pattern", "layers_to_transform", "exclude_modules"),
    "layer_replication",
)
_LISTS = ("target_parameters", "modules_to_save")


class StoredAdapter:
    """What an adapter changes of the tensors of its base."""

    def __init__(self, place: Path, name: str, structure: Structure) -> None:
        """Open an adapter.

        Args:
            place: its folder.
            name: what errors call it.
            structure: of the base.

        Raises:
            CartError: it cannot be read, lacks tensors or holds others, or its config is another
                than `compress` writes.
        """
        self._name = name
        self._files: Checkpoint = open_adapter(place, name)
        self._structure = structure
        config = self._files.config
        self._check_config(config)
        self._layers = _layers(structure, config)
        self._biases = {
            f"{layer.module}.bias": layer
            for layer in self._layers.values()
            if peft_files.bias_name(layer) in self._files.tensors
        }
        self._check()

    def applied(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the base as the task has it, in the base's dtype.

        Args:
            name: in the model's state dict.
            tensor: the base's.

        Raises:
            CartError: the adapter's values cannot be read, are not finite, or leave the dtype's
                range.
        """
        exact = peft_files.exact_name(name)
        if exact in self._files.tensors:
            found = self._files.read(exact)
            # Not infinite ones: a mask of the model's own may hold them.
            if found.is_floating_point() and bool(found.isnan().any()):
                check_finite(found, [f"adapter {self._name}"], [found], f"tensor {exact!r}")
            return found.to(tensor.dtype)
        if name in self._layers:
            layer = self._layers[name]
            a, b = (self._read(peft_files.lora_name(layer, side)) for side in "AB")
            delta = layer.difference(a, b)
        elif name in self._biases:
            layer = self._biases[name]
            delta = self._read(peft_files.bias_name(layer))
            delta = delta.to(torch.promote_types(tensor.dtype, torch.float32))
        else:
            return tensor
        changed = (delta.mul_(self._scaling(layer)) + tensor).to(tensor.dtype)
        check_range(changed, f"tensor {name!r} with adapter {self._name}")
        return changed

    def _read(self, tensor: str) -> Tensor:
        found = self._files.read(tensor)
        check_finite(found, [f"adapter {self._name}"], [found], f"tensor {tensor!r}")
        return found

    def _scaling(self, layer: Layer) -> float:
        rows = self._files.tensors[peft_files.lora_name(layer, "A")].shape[0]
        return peft_files.scaling(self._files.config, layer, rows)

    def _check_config(self, config: Mapping[str, Any]) -> None:
        """Refuse what `compress` does not write."""
        for key in _UNUSED:
            if config.get(key):
                raise self._strange(f"adapter_config.json has {key}: {config[key]!r}")
        for key in _LISTS:
            if not isinstance(config.get(key), (list, type(None))):
                raise self._strange(f"adapter_config.json has {key}: {config[key]!r}")
        targets = config.get("target_modules")
        try:
            is_known = isinstance(targets, list) or bool(re.compile(targets or ""))
        except (re.error, TypeError):
            is_known = False
        if not is_known:
            raise self._strange(f"adapter_config.json has target_modules: {targets!r}")
        alpha, rank = config.get("lora_alpha"), config.get("r")
        if isinstance(alpha, bool) or alpha != rank:
            raise self._strange(
                f"adapter_config.json has lora_alpha {alpha!r} and r {rank!r}, which were equal"
            )

    def _check(self) -> None:
        """Refuse tensors that are missing, of other shapes, or nobody's."""
        known = set()
        for layer in self._layers.values():
            a, b = (peft_files.lora_name(layer, side) for side in "AB")
            bias = peft_files.bias_name(layer)
            known |= {a, b, bias}
            self._check_held(a, None)
            rank = (*self._files.tensors[a].shape, 0)[0] // layer.matrices[0]
            pattern = self._files.config.get("rank_pattern") or {}
            if rank < 1 or pattern.get(peft_files.pattern_key(layer), rank) != rank:
                raise self._strange(f"{a} is {self._files.tensors[a].shape}")
            for tensor, shape in zip((a, b), layer.lora_shapes(rank), strict=True):
                self._check_held(tensor, shape)
            if bias in self._files.tensors:
                self._check_held(bias, (layer.matrices[1],))
        for module in self._files.config.get("modules_to_save") or ():
            for name in self._structure.below(str(module)):
                self._check_held(peft_files.exact_name(name), None)
        for name, value in self._structure.state.items():
            exact = peft_files.exact_name(name)
            known.add(exact)
            if exact in self._files.tensors:
                self._check_held(exact, tuple(value.shape), value.is_floating_point())
        if strange := sorted(self._files.tensors.keys() - known):
            raise self._strange(f"it holds {some(strange)}, for which the base has no place")

    def _check_held(
        self, tensor: str, shape: tuple[int, ...] | None, is_floating: bool = True
    ) -> None:
        info = self._files.tensors.get(tensor)
        if info is None:
            raise self._strange(f"it lacks {tensor}")
        if shape is not None and (info.shape != shape or info.is_floating != is_floating):
            kind = info.stored or info.dtype
            raise self._strange(f"{tensor} is {info.shape} of {kind}, and not {shape} as it was")

    def _strange(self, fact: str) -> CheckpointError:
        return CheckpointError(f"adapter {self._name} is not as it was written: {fact}", _AGAIN)


def _layers(structure: Structure, config: Mapping[str, Any]) -> dict[str, Layer]:
    """The layers that an adapter holds, by the parameter's name, and those that it should."""
    parameters = set(config.get("target_parameters") or ())
    layers = {}
    for name in structure.state:
        # Not what `compress` would choose today: what this adapter has.
        layer = structure.by_class(name)
        if name in parameters and (layer is None or not layer.is_parameter):
            layer = structure.as_parameter(name)
        if layer is None:
            continue
        if name in parameters if layer.is_parameter else _is_target(layer.module, config):
            layers[name] = layer
    return nested(layers, structure)


def _is_target(module: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT wraps a module: it takes names from their ends, or an expression."""
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in targets or ())
