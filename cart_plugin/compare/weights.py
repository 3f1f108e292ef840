"""The models that a recipe merges with each other, and how much each counts, for another method.

All here works on recipes as plain data, and changes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.common import ModelReference
from mergekit.merge_methods import MergeMethod

from cart_plugin.doctor.parameters import is_cart

_WEIGHT = "weight"


@dataclass(frozen=True)
class Held:
    """A group's models, as `cart_plugin.doctor.layout.Group` has them of a parsed recipe.

    Attributes:
        entries: the recipe's list.
        base: the label of their base model, if there is one.
        around: what sets parameters for all of them, the nearest first.
    """

    entries: list[dict[str, Any]]
    base: str | None
    around: tuple[dict[str, Any], ...]

    @property
    def tuned(self) -> list[dict[str, Any]]:
        """The entries but the base model's, unless it is all there is."""
        found = [entry for entry in self.entries if _label(entry["model"]) != self.base]
        return found or self.entries

    def weight(self, entry: Mapping[str, Any]) -> Any:
        """What the recipe sets for a model, itself or around it; None if nothing."""
        places = [place.get("parameters") or {} for place in (entry, *self.around)]
        return next((place[_WEIGHT] for place in places if _WEIGHT in place), None)


def groups(recipe: dict[str, Any]) -> Iterator[Held]:
    """The groups of models that a recipe merges."""
    base = _base(recipe)
    modules = (recipe.get("modules") or {}).values()
    for part in (recipe, *modules):
        around = (recipe,) if part is recipe else (part, recipe)
        if part.get("models"):
            yield Held(part["models"], base, around)
        for piece in part.get("slices") or ():
            yield Held(piece["sources"], _base(piece) or base, (piece, *around))


def _base(part: Mapping[str, Any]) -> str | None:
    base = part.get("base_model")
    return None if base is None else _label(base)


def _label(model: Any) -> str:
    return str(ModelReference.model_validate(model))


def drop_base(recipe: dict[str, Any]) -> None:
    """Take the base model off, also where it is listed among the models, as ties recipes do.

    A slice of it alone keeps its layers.
    """
    for group in list(groups(recipe)):
        group.entries[:] = group.tuned
        for part in group.around:
            part.pop("base_model", None)


def are_shares(recipe: Mapping[str, Any], method: MergeMethod | None) -> bool:
    """Whether only the ratio of a recipe's weights counts, by its own method."""
    specs = {} if method is None else {spec.name: spec for spec in method.spec.parameters}
    if method is None or _WEIGHT not in specs:
        return False
    for name in ("normalize", "normalize_weights"):
        if name in specs:
            values = settings(recipe, name) or [specs[name].default]
            return all(value == 1 for value in values)  # YAML's true, too
    return is_cart(method) or method.spec.name == "nuslerp"


def settings(node: Any, name: str) -> list[Any]:
    """All values that a recipe sets for a parameter."""
    if isinstance(node, list):
        return [value for entry in node for value in settings(entry, name)]
    if not isinstance(node, dict):
        return []
    own = [value for key, value in (node.get("parameters") or {}).items() if key == name]
    inside = [settings(value, name) for key, value in node.items() if key != "parameters"]
    return own + [value for values in inside for value in values]


def write_shares(recipe: dict[str, Any]) -> bool:
    """Scale the weights of each group to sum 1; a model without one counts as 1.

    Returns:
        False, and nothing is changed, if a weight is not one number for all tensors.
    """
    found: list[tuple[dict[str, Any], float]] = []
    for group in groups(recipe):
        weights = [group.weight(entry) for entry in group.tuned]
        if not all(weight is None or type(weight) in (int, float) for weight in weights):
            return False
        counts = [1.0 if weight is None else weight for weight in weights]
        total = sum(counts) or 1.0
        shares = [round(count / total, 6) for count in counts]
        found += zip(group.tuned, shares, strict=True)
    for part in [part for group in groups(recipe) for part in (*group.around, *group.entries)]:
        _take_off(part)
    if len({share for _, share in found}) == 1:
        found = [(recipe, found[0][1])]
    for place, share in found:
        place.setdefault("parameters", {})[_WEIGHT] = share
    return True


def _take_off(part: dict[str, Any]) -> None:
    parameters = part.get("parameters") or {}
    parameters.pop(_WEIGHT, None)
    if not parameters:
        part.pop("parameters", None)
