"""The models of a recipe, for `mergekit-cart inspect`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelPath
from mergekit.config import MergeConfiguration
from mergekit.parameter_resolver import resolve_parameter

from cart_plugin.doctor import schema
from cart_plugin.doctor.layout import Recipe, groups, references
from cart_plugin.doctor.parameters import unframed
from cart_plugin.doctor.recipe import load
from cart_plugin.errors import CartError
from cart_plugin.execution.inputs import stop_at
from cart_plugin.execution.settings import Depths, reader
from cart_plugin.inspect.weighting import Weighting
from cart_plugin.mergekit import SPEC

_WEIGHT = next(spec for spec in SPEC.parameters if spec.name == "weight")


@dataclass(frozen=True)
class Subjects:
    """What a recipe merges.

    Attributes:
        models: in its order, as `MODEL` or `BASE+ADAPTER`; a base model that is merged, too, is not
            among them.
        base: their base model.
        weighting: its weights; None if it has none.
    """

    models: tuple[str, ...]
    base: str | None
    weighting: Weighting | None


def subjects(recipe: Path, base: str | None) -> Subjects:
    """The models that a recipe merges, their base, and how much each counts.

    Args:
        recipe: the YAML file, of one recipe for mergekit-yaml or mergekit-pytorch.
        base: takes the place of the recipe's base model.

    Raises:
        CartError: it is no recipe, several, or merges slices of layers; or its base model has an
            adapter.
    """
    documents, findings = load(recipe)
    if findings:
        raise CartError(f"{recipe}: {findings[0].fact}; {findings[0].advice}")
    if len(documents) > 1:
        raise CartError(f"{recipe} holds several recipes; inspect takes one")
    # Whatever the method, and without one, too.
    document = {"merge_method": "linear", **documents[0]}
    document.pop("name", None)
    config, findings = schema.parse(document, schema.recipe_class(document))
    stop_at(findings)
    if config is None:
        raise CartError(f"mergekit rejects {recipe}")
    merged = groups(config)
    if len(merged) != 1 or merged[0].label != "models":
        raise CartError(f"{recipe} merges slices of layers or modules; inspect takes whole models")
    named = references(config)
    own = None if config.base_model is None else str(config.base_model)
    labels = [label for label in dict.fromkeys(merged[0].models) if label != own]
    models = tuple(
        "+".join(_place(part) for part in (named[label].model, named[label].lora) if part)
        for label in labels
    )
    if base is None and own is not None:
        if named[own].lora is not None:
            raise CartError(
                f"{recipe}: its base model {own} has an adapter, and inspect takes a whole one; "
                "fuse them (PEFT's merge_and_unload, then save_pretrained) and name that (--base)"
            )
        base = _place(named[own].model)
    return Subjects(models, base, _weighting(recipe, document, config, labels))


def _place(part: ModelPath) -> str:
    """With its revision on the hub; of what is here there is but one, for mergekit, too."""
    return str(part.path) if os.path.exists(part.path) else str(part)


def _weighting(
    recipe: Path, document: Mapping[str, Any], config: Recipe, labels: Sequence[str]
) -> Weighting | None:
    """The recipe's weights; None if it names none, and all count alike."""
    written: dict[str, Any] = {}
    for entry, source in zip(groups(config)[0].entries, document["models"], strict=True):
        # As mergekit, of a model that is named twice the first.
        written.setdefault(str(entry.model), (source.get("parameters") or {}).get(_WEIGHT.name))
    common = (document.get("parameters") or {}).get(_WEIGHT.name)
    own = [written[label] for label in labels]
    if common is None and all(weight is None for weight in own):
        return None

    def of(names: Sequence[str]) -> dict[str, list[float]]:
        weights = _Weights(recipe, config)
        depths = Depths(names)
        return {
            name: [weights.of(label, name, depths.of(name)) for label in labels] for name in names
        }

    return Weighting(of, own, common)


class _Weights:
    """A recipe's weights as mergekit resolves them; 1 where it has none, as in our methods."""

    def __init__(self, recipe: Path, config: Recipe) -> None:
        self._recipe, self._config = recipe, config
        self._models = references(config)
        self._reader = reader(config) if isinstance(config, MergeConfiguration) else None

    def of(self, label: str, name: str, depth: float) -> float:
        """Of a model, for a tensor at a share of the layers.

        Raises:
            CartError: it is no number.
        """
        model = self._models[label]
        if self._reader is not None:
            sources = self._reader.parameter_sources(model)
        else:  # mergekit-pytorch, which knows of no layers
            (group,) = groups(self._config)
            entry = next(entry for entry in group.entries if str(entry.model) == label)
            sources, depth = (entry.parameters, self._config.parameters), 0.0
        try:
            found = resolve_parameter(_WEIGHT, sources, tensor_name=name, t=depth, model=model)
        except ValueError as error:
            raise CartError(f"{self._recipe}: model {label}: {unframed(error)}") from None
        return 1.0 if found is None else float(found)
