"""A recipe's parameters for tensors that are merged one by one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import (
    ConfigReader,
    InputSliceDefinition,
    MergeConfiguration,
    OutputSliceDefinition,
)
from mergekit.parameter_resolver import resolve_parameters

from cart_plugin.doctor.layout import references
from cart_plugin.errors import CartError
from cart_plugin.execution.inputs import Inputs
from cart_plugin.execution.layout import Placed
from cart_plugin.mergekit import CartMerge, check_places

_LAYER = re.compile(r"\.(\d+)\.")


class TensorName(str):
    """A tensor's name in the model, in which filters find its names in the models' files, too.

    Recipes filter by the names that their authors see: in most files, those of another format.
    Of a tensor that is stored in parts, such as experts, a filter has to mean all of them.
    """

    stored: tuple[tuple[str, ...], ...]

    def __new__(cls, name: str, stored: Iterable[tuple[str, ...]] = ()) -> TensorName:
        """Take the model's name, and for each file those of the tensor's parts."""
        self = super().__new__(cls, name)
        self.stored = tuple(dict.fromkeys(stored))
        return self

    def __contains__(self, text: object) -> bool:
        """Whether a filter means this tensor."""
        names = [(str(self),), *self.stored]
        return any(all(str(text) in part for part in parts) for parts in names)


class Depths:
    """Where gradients of a recipe stand: 0 at the first layer, 1 at the last."""

    def __init__(self, names: Iterable[str]) -> None:
        """Take the names of all tensors: gradients go along their layers."""
        self._layers: dict[str, int] = {}
        for name in names:
            if found := _LAYER.search(name):
                prefix = name[: found.start()]
                count = max(self._layers.get(prefix, 0), int(found.group(1)) + 1)
                self._layers[prefix] = count

    def of(self, name: str) -> float:
        """Of a tensor."""
        found = _LAYER.search(name)
        if found is None:
            return 0.0
        layers = self._layers[name[: found.start()]]
        return int(found.group(1)) / (layers - 1) if layers > 1 else 1.0


def reader(config: MergeConfiguration) -> ConfigReader:
    """What gives a recipe's settings for whole models in the order of their precedence."""
    # As mergekit's planner has it: one slice of all layers.
    sources = [
        InputSliceDefinition(model=entry.model, layer_range=(0, 0), parameters=entry.parameters)
        for entry in config.models or ()
    ]
    whole = OutputSliceDefinition(sources=sources)
    return ConfigReader(config=config, slice_out=whole, t=0)


class Settings:
    """The method's parameters by tensor, as mergekit's planner resolves them.

    Raises:
        CartError: the method does not take such models.
    """

    def __init__(
        self, inputs: Inputs, placed: Mapping[str, Placed], names: Iterable[str] = ()
    ) -> None:
        """Take the recipe, and the names of all tensors: gradients go along their layers."""
        self._placed = placed
        self.method = merge_methods.get(inputs.config.merge_method)
        self.models: dict[str, ModelReference] = references(inputs.config)
        self.base: ModelReference | None = inputs.config.base_model
        self._depths = Depths(names)
        self._reader = reader(inputs.config)
        base = None if self.base is None else str(self.base)
        if isinstance(self.method, CartMerge):
            check_places(list(self.models.values()), self.base)
        try:
            # By their labels: our methods compare the names in models' files, which say nothing
            # here. What the tensors are in the model has been compared.
            self.method.validate_inputs(list(self.models), base, group_name="default.slices[0]")
        except ValueError as error:
            raise error if isinstance(error, CartError) else CartError(str(error)) from None

    def name(self, name: str) -> TensorName:
        """A tensor's name for filters."""
        held = [it for it in self._placed.values() if name in it.units.keys() - it.tied.keys()]
        return TensorName(name, (placed.units[name].sources for placed in held))

    def of(self, name: str) -> tuple[dict[str, Any], dict[ModelReference, dict[str, Any]]]:
        """The parameters that all models share for a tensor, and each model's own.

        Raises:
            CartError: one that the method needs is missing, or no value for it.
        """
        named = self.name(name)
        try:
            return resolve_parameters(
                self.method.spec,
                tensor_name=named,
                inputs=dict.fromkeys(self.models.values(), named),
                sources=self._reader.parameter_sources,
                base_model=self.base,
                t=self._depths.of(name),
            )
        except (RuntimeError, ValueError) as error:
            raise CartError(str(error)) from None
