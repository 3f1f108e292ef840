"""The recipes that one recipe implies: the same models and settings, another merge method.

A setting that a method does not know is left out; one that it needs and the recipe lacks gets the
method's default. All of a method's parameters end up in its recipe, so that the file says what ran;
but for the default rank of `cart`, which depends on the models.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from mergekit import merge_methods
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import BasePolicy, MergeMethod
from mergekit.merge_methods.base import ParameterScope, ParameterSpec

from cart_plugin.compare import weights
from cart_plugin.doctor.layout import Group, groups
from cart_plugin.doctor.parameters import check_method, did_you_mean
from cart_plugin.errors import CartError
from cart_plugin.execution.inputs import plain
from cart_plugin.linalg.rules import RANK_RULES

Settings = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One row of the comparison before it is merged.

    Attributes:
        name: of its folder and row, such as `cart` or `cart-rank_ratio=0.16`.
        method: mergekit's name of the method.
        recipe: for mergekit-yaml.
        settings: the method's parameters that hold for the whole recipe, or for all models alike.
        error: why the method cannot take these models; empty if it can.
    """

    name: str
    method: str
    recipe: Mapping[str, Any]
    settings: Mapping[str, Any]
    error: str = ""


@dataclass(frozen=True)
class Assignment:
    """`METHOD.PARAMETER=VALUE[,VALUE...]` of the command line."""

    method: str
    parameter: str
    values: tuple[Any, ...]


def parse_assignment(text: str, *, single: bool) -> Assignment:
    """Read `ties.density=0.3`, or `cart.lambda=1,2` unless `single`.

    Raises:
        CartError: it has another form, or names no method or parameter that there is.
    """
    target, equals, value = text.partition("=")
    name, dot, parameter = target.strip().partition(".")
    if not equals or not dot or not value.strip():
        form = "METHOD.PARAMETER=VALUE" + ("" if single else ",VALUE...")
        raise CartError(f"{text!r} is not of the form {form}, such as ties.density=0.3")
    specs = {spec.name: spec for spec in find_method(name).spec.parameters}
    if parameter not in specs:
        hint = did_you_mean(parameter, specs) or f"it has {', '.join(specs) or 'none'}"
        raise CartError(f"{name} has no parameter {parameter!r}; {hint}")
    parts = [value] if single else value.split(",")
    values = [_valid(name, specs[parameter], part.strip()) for part in parts]
    # 1 and 1.0 are one setting.
    return Assignment(name, parameter, tuple(dict.fromkeys(values)))


def _valid(method: str, spec: ParameterSpec, text: str) -> Any:
    try:
        return spec.validate(yaml.safe_load(text))
    except yaml.YAMLError:
        raise CartError(f"{method}.{spec.name}={text} is not a value") from None
    except ValueError as error:
        details = getattr(error, "errors", None)
        reason = str(details()[0]["msg"]).removeprefix("Value error, ") if details else str(error)
        raise CartError(f"{method}.{spec.name}={text} is refused: {reason}") from None


def find_method(name: str) -> MergeMethod:
    """Mergekit's method of this name.

    Raises:
        CartError: there is none; the message lists those that there are.
    """
    known = {method.spec.name: method for method in merge_methods.registered_methods()}
    if name not in known:
        hint = did_you_mean(name, known) or f"known methods: {', '.join(sorted(known))}"
        raise CartError(f"unknown method {name!r}; {hint}")
    return known[name]


def variants(
    document: Mapping[str, Any],
    methods: Sequence[str],
    fixed: Sequence[Assignment] = (),
    grids: Sequence[Assignment] = (),
) -> list[Variant]:
    """The variants of a recipe, method by method, the points of a grid one after another.

    Args:
        document: the recipe, as its YAML says; left unchanged.
        methods: names of mergekit methods.
        fixed: settings that replace the recipe's.
        grids: settings of which every combination is tried; those of one method multiply.

    Raises:
        CartError: unknown methods, a setting for a method that is not compared, or two values for
            one parameter.
    """
    for name in methods:
        find_method(name)
    for number, line in enumerate((*fixed, *grids)):
        if line.method not in methods:
            raise CartError(
                f"{line.method}.{line.parameter} is set, but {line.method} is not compared; "
                f"add it to --methods"
            )
        if any(
            (line.method, line.parameter) == (other.method, other.parameter)
            for other in (*fixed, *grids)[:number]
        ):
            raise CartError(f"{line.method}.{line.parameter} is given twice")
    return [
        _variant(document, find_method(name), fixed_values | point, point)
        for name in dict.fromkeys(methods)
        for fixed_values in [{line.parameter: line.values[0] for line in _of(fixed, name)}]
        for point in _points(_of(grids, name))
    ]


def absolute(config: MergeConfiguration) -> dict[str, Any]:
    """A recipe as plain data whose local models have absolute paths: it runs from any folder."""
    return plain(config, _absolute)


def _absolute(model: ModelReference) -> ModelReference:
    parts = {"model": _local(model.model), "lora": model.lora and _local(model.lora)}
    return model.model_copy(update=parts)


def _local(part: ModelPath) -> ModelPath:
    if not os.path.isdir(part.path):
        return part
    # `..` stays as it is: after a link it is another folder than the text says.
    return part.model_copy(update={"path": str(Path(part.path).absolute())})


def _of(lines: Sequence[Assignment], method: str) -> list[Assignment]:
    return [line for line in lines if line.method == method]


def _points(grids: Sequence[Assignment]) -> Iterator[Settings]:
    for values in product(*(line.values for line in grids)):
        yield dict(zip((line.parameter for line in grids), values, strict=True))


def _variant(
    document: Mapping[str, Any], method: MergeMethod, overrides: Settings, point: Settings
) -> Variant:
    recipe = copy.deepcopy(dict(document))
    recipe.pop("name", None)
    recipe["merge_method"] = method.spec.name
    specs = {spec.name: spec for spec in method.spec.parameters}
    own = document.get("merge_method")
    foreign = _foreign(own, method.spec.name)
    given = _reduce(recipe, {k: v for k, v in specs.items() if k not in foreign}, overrides)
    if method.spec.contract.base is BasePolicy.IGNORED:
        weights.drop_base(recipe)
    recipe["parameters"] = (recipe.get("parameters") or {}) | overrides
    if "weight" in specs and specs["weight"].required and "weight" not in overrides:
        _carry_weights(document, recipe, method)
    top = recipe.pop("parameters", {})
    for name, value in _defaults(specs, given | set(overrides)).items():
        top.setdefault(name, value)
    if top:
        recipe["parameters"] = top
    label = "-".join([method.spec.name, *(f"{key}={value}" for key, value in point.items())])
    return Variant(label.replace("/", "_"), method.spec.name, recipe, top, _refusal(recipe, method))


def _carry_weights(
    document: Mapping[str, Any], recipe: dict[str, Any], method: MergeMethod
) -> None:
    """Make weights of which only the ratio counts sum to 1 for a method that adds up by them."""
    own, name = document.get("merge_method"), method.spec.name
    by_ratio = weights.are_shares(document, check_method(own)[0])
    as_written = own == name or not (by_ratio or weights.are_shares(recipe, method))
    if as_written and weights.settings(recipe, "weight"):
        return
    done = weights.write_shares(recipe)
    if not done and by_ratio and any(spec.name == "normalize" for spec in method.spec.parameters):
        recipe["parameters"].setdefault("normalize", True)


# Settings of one name and two meanings, with the methods that have the second.
_APART = {
    # scales a few directions around the average, not whole differences from the base
    "lambda": {"cart"},
    # divides whole models, not differences: of three that weigh 0.6 it leaves 1.8 models
    "normalize": {"linear"},
    # how small a difference counts as none, not a range of densities
    "epsilon": {"ram", "ramplus_tl"},
    # how alike is near, not a share of the way
    "t": {"nearswap"},
}


def _foreign(own: object, method: str) -> set[str]:
    """The settings of a recipe whose values say nothing about another method."""
    if own == method:
        return set()
    found = {name for name, apart in _APART.items() if (own in apart) != (method in apart)}
    # Of ranks, the one drops what the other weighs down.
    return found | (set(RANK_RULES) if {own, method} == {"cart", "cart_auto"} else set())


def _reduce(node: Any, specs: Mapping[str, ParameterSpec], overrides: Settings) -> set[str]:
    """Take off what the method does not know or is overridden; return the names of the rest."""
    kept: set[str] = set()
    replaced = set(overrides)
    if replaced & set(RANK_RULES):
        replaced |= set(RANK_RULES)
    if isinstance(node, dict):
        parameters = node.get("parameters")
        if isinstance(parameters, dict):
            left = {
                name: value
                for name, value in parameters.items()
                if name in specs and name not in replaced
            }
            kept |= set(left)
            if left:
                node["parameters"] = left
            else:
                del node["parameters"]
        for key, value in node.items():
            if key != "parameters":
                kept |= _reduce(value, specs, overrides)
    elif isinstance(node, list):
        for entry in node:
            kept |= _reduce(entry, specs, overrides)
    return kept


def _defaults(specs: Mapping[str, ParameterSpec], given: set[str]) -> dict[str, Any]:
    """What the recipe leaves open, as far as a number says it."""
    values: dict[str, Any] = {}
    for name, spec in specs.items():
        if name in given or name in RANK_RULES:  # ours look at the tensors where none is given
            continue
        if not spec.required and spec.default is not None:
            values[name] = spec.default
        elif name == "weight" and not spec.required:  # ours count 1, and tell it from a written 1
            values[name] = 1.0
    return values


def _refusal(recipe: dict[str, Any], method: MergeMethod) -> str:
    missing = [
        spec.name
        for spec in method.spec.parameters
        if spec.required
        and spec.scope is ParameterScope.SHARED
        and not weights.settings(recipe, spec.name)
    ]
    found = groups(MergeConfiguration.model_validate(recipe))
    if method.spec.contract.base is BasePolicy.REQUIRED and any(one.base is None for one in found):
        return f"{method.spec.name} needs a base_model, which the recipe lacks"
    if missing:
        return (
            f"{method.spec.name} needs {', '.join(missing)}, for which mergekit has no default; "
            f"add --set {method.spec.name}.{missing[0]}=VALUE"
        )
    try:
        _check_inputs(found, method)
    except ValueError as error:
        return str(error)
    return ""


def _check_inputs(found: Sequence[Group], method: MergeMethod) -> None:
    """Let a method look at each group's models, as mergekit does before it merges.

    Raises:
        ValueError: it does not take them.
    """
    for group in found:
        part, is_slice, _ = group.label.rpartition(".sources")
        models = list(group.models)
        if not is_slice and group.base is not None and group.base not in models:
            models.append(group.base)
        method.validate_inputs(models, group.base, group_name=f"recipe.{part}" if part else None)
    if is_slice:  # a tensor's: that no slice merges models is known only now
        method.validate_inputs(models, group.base, group_name="the recipe")
