"""Checks of the method and the parameters that a recipe sets, before any model is looked at.

mergekit ignores in silence what a method does not declare and what stands where it is not read;
each such setting is found here, at whatever level it was written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, ParameterSetting
from mergekit.merge_methods.base import BasePolicy, MergeMethod, ParameterScope, ParameterSpec

from cart_plugin.doctor.findings import Finding, problem, warning
from cart_plugin.doctor.layout import (
    Group,
    Place,
    Recipe,
    conditions,
    groups,
    places,
    references,
    scalars,
)
from cart_plugin.linalg.rules import RANK_RULES
from cart_plugin.mergekit import CartMerge, place_of
from cart_plugin.wording import count, some

_LOW_LAMBDA = 0.5


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A suggestion for a name that is not known, or nothing if none is like it."""
    by_lower = {word.lower(): word for word in known}
    matches = get_close_matches(name.lower(), list(by_lower), n=1)
    return f"did you mean {by_lower[matches[0]]}?" if matches else ""


def check_method(name: object) -> tuple[MergeMethod | None, list[Finding]]:
    """Look a merge method up by the name a recipe gives."""
    known = {method.spec.name: method for method in merge_methods.registered_methods()}
    if isinstance(name, str) and name in known:
        return known[name], []
    if name is None:
        return None, [problem("the recipe has no merge_method", "add `merge_method: cart`")]
    return None, [
        problem(
            f"merge_method {name}: mergekit has no such method",
            did_you_mean(str(name), known) or f"choose one of {', '.join(sorted(known))}",
        )
    ]


def is_cart(method: MergeMethod) -> bool:
    """Whether a method is one of this package's."""
    return isinstance(method, CartMerge)


def check_settings(config: Recipe, method: MergeMethod) -> list[Finding]:
    """Check names, places and values of all parameters of a recipe."""
    findings: list[Finding] = []
    for place in places(config):
        for name, setting in place.settings.items():
            findings += _check_setting(place, name, setting, method)
        if is_cart(method):
            findings += _check_rank_rules(place)
            findings += _check_rank(place)
            if method.spec.name == "cart" and not _is_around_base(config):
                findings += _check_lambda(place)
            if method.spec.name == "cart_auto":
                findings += _check_weight(place)
    return findings


def _check_weight(place: Place) -> Iterator[Finding]:
    for value in scalars(place.settings.get("weight")):
        if isinstance(value, (int, float)) and value < 0:
            yield problem(
                f"{place.name('weight')} is {value:g}: cart_auto takes no negative weights",
                "set merge_method: cart, or drop the model",
            )


def check_groups(config: Recipe, method: MergeMethod) -> list[Finding]:
    """Check that each group of models has as many as the method needs, and the base it needs."""
    findings: list[Finding] = []
    named = references(config)
    for group in groups(config):
        findings += _check_places(group, named)
        findings += _check_own_weight(group, config, method)
        twice = sorted({label for label in group.models if group.models.count(label) > 1})
        if twice:
            findings.append(
                problem(
                    f"{group.label} names a model twice: {twice[0]}",
                    "delete one of them; `weight` makes a model count more",
                )
            )
        if method.spec.contract.base == BasePolicy.REQUIRED and group.base is None:
            findings.append(
                problem(
                    f"{group.label}: {method.spec.name} needs a base model",
                    "add `base_model:` to the recipe",
                )
            )
        if adds_base(group, method) and method.spec.contract.max_inputs is None:
            findings.append(
                warning(
                    f"{group.label}: the base model {group.base} would be averaged in, as one more "
                    f"model: {method.spec.name} knows no base",
                    "delete `base_model:`; or list it among the models, if that is meant",
                )
            )
        if is_cart(method):
            findings += _check_cart_group(group, config)
    return findings


def adds_base(group: Group, method: MergeMethod) -> bool:
    """Whether mergekit merges the base model of a group as one more model of it."""
    return (
        method.spec.contract.base == BasePolicy.IGNORED
        and group.label.endswith("models")  # of slices, only what is listed is merged
        and group.base is not None
        and group.base not in group.models
    )


def _check_places(group: Group, named: Mapping[str, ModelReference]) -> Iterator[Finding]:
    """Report one folder under two paths: mergekit compares what is written."""
    labels = dict.fromkeys([*group.models, *([] if group.base is None else [group.base])])
    seen: dict[tuple[str, ...], str] = {}
    for label in labels:
        other = seen.setdefault(place_of(named[label]), label)
        if other == label:
            continue
        if group.base in (label, other):
            fact = f"{other} and the base model {label} are one folder: the base would be merged"
            advice = "write its path alike in both places"
        else:
            fact = f"{other} and {label} are one folder: the model would count twice"
            advice = "delete one of them; `weight` makes a model count more"
        yield problem(f"{group.label}: {fact}", advice)


def _check_own_weight(group: Group, config: Recipe, method: MergeMethod) -> Iterator[Finding]:
    """Report the one model of a group that has no weight: often the base model of a recipe."""
    optional = any(spec.name == "weight" and not spec.required for spec in method.spec.parameters)
    for_all = (place.settings for place in places(config) if place.model is None)
    if not optional or any("weight" in settings for settings in for_all):
        return
    tuned = [entry for entry in group.entries if str(entry.model) != group.base]
    without = [str(entry.model) for entry in tuned if "weight" not in (entry.parameters or {})]
    if len(without) == 1 and len(tuned) > 2:
        yield warning(
            f"{group.label}: {without[0]} has no weight while all others have; it counts 1.0",
            "give it one; or, if it is the base model, name it as `base_model`",
        )


def _check_cart_group(group: Group, config: Recipe) -> Iterator[Finding]:
    tuned = len([model for model in group.models if model != group.base])
    around_base = _is_around_base(config)
    if _is_kept(group, config):
        return
    if tuned < 2:
        yield problem(
            f"{group.label}: {count(tuned, 'fine-tuned model')}; {config.merge_method} needs at "
            "least two beside the base model",
            "add models",
        )
    elif tuned == 2 and not _takes_base(group, config):
        yield warning(
            f"{group.label}: with two models {config.merge_method} is plain averaging, at any rank",
            _for_two(group, config),
        )
    if around_base and group.base is None:
        yield problem(
            f"{group.label}: center is base, but there is no base model",
            "add `base_model:` to the recipe, or delete `center`",
        )


def _takes_base(group: Group, config: Recipe) -> bool:
    """Whether the base model has a part in the result."""
    if config.merge_method == "cart_auto" and group.base is not None:
        return not any(
            value == "average"
            for place in places(config)
            if place.model is None
            for value in scalars(place.settings.get("center"))
        )
    return _is_around_base(config)


def _for_two(group: Group, config: Recipe) -> str:
    """What to do in the place of averaging two models."""
    if config.merge_method == "cart":
        base = "" if group.base else " with their base model as base_model"
        return f"set merge_method: cart_auto{base}, or add a third model"
    if group.base is None:
        return "name their base model as base_model: it shows where the inputs of each lie"
    return "delete center: average, so that the base model shows where the inputs of each lie"


def _is_kept(group: Group, config: Recipe) -> bool:
    """Whether a group is a slice of one model, beside slices that are merged."""
    return (
        len(group.models) == 1
        and group.label.endswith(".sources")
        and any(len({*other.models} - {other.base}) > 1 for other in groups(config))
    )


def _is_around_base(config: Recipe) -> bool:
    """Whether the recipe sets `center: base` anywhere."""
    return any(
        value == "base"
        for place in places(config)
        if place.model is None and "center" in place.settings
        for value in scalars(place.settings["center"])
    )


def _check_setting(
    place: Place, name: str, setting: ParameterSetting, method: MergeMethod
) -> Iterator[Finding]:
    where = place.name(name)
    spec = next((spec for spec in method.spec.parameters if spec.name == name), None)
    if spec is None:
        yield _unknown_parameter(where, name, method)
        return
    if place.model is not None and spec.scope == ParameterScope.SHARED:
        yield problem(
            f"{where} is ignored: {name} holds for all models, and mergekit does not read it here",
            "move it to the recipe's, module's or slice's own `parameters:`",
        )
    elif place.is_base and spec.scope == ParameterScope.NON_BASE:
        yield warning(
            f"{where} is ignored: {place.model} is the base model, which has no {name}",
            "delete it",
        )
    yield from _check_values(where, spec, setting)
    yield from _check_order(where, setting)


def _unknown_parameter(where: str, name: str, method: MergeMethod) -> Finding:
    others = [
        other.spec.name
        for other in merge_methods.registered_methods()
        if any(spec.name == name for spec in other.spec.parameters)
    ]
    if others:
        return warning(
            f"{where} is ignored: it is a parameter of {some(sorted(others))}, "
            f"not of {method.spec.name}",
            "delete it, unless it is there for trying several methods with one recipe",
        )
    known = [spec.name for spec in method.spec.parameters]
    return problem(
        f"{where} is unknown and would be ignored",
        did_you_mean(name, known) or f"{method.spec.name} has {', '.join(known)}",
    )


def _check_values(where: str, spec: ParameterSpec, setting: ParameterSetting) -> Iterator[Finding]:
    for value in scalars(setting):
        if reason := _rejection(spec, value):
            yield problem(f"{where}: {reason}", f"correct the value {value!r}")


def _rejection(spec: ParameterSpec, value: object) -> str:
    """Why the method refuses a value, without pydantic's frame; nothing if it takes it."""
    try:
        spec.validate(value)
    except ValueError as error:
        return unframed(error)
    return ""


def unframed(error: ValueError) -> str:
    """What an error says, without pydantic's frame."""
    details = getattr(error, "errors", None)
    return str(details()[0]["msg"]).removeprefix("Value error, ") if details else str(error)


def _check_order(where: str, setting: ParameterSetting) -> Iterator[Finding]:
    filters = [condition.filter for condition in conditions(setting)]
    for number, text in enumerate(filters[:-1]):
        if text in (None, "*"):
            yield problem(
                f"{where}[{number}] has no filter, so that the entries after it never count",
                "make it the last one: the first entry that matches a tensor decides",
            )


def _check_rank_rules(place: Place) -> Iterator[Finding]:
    # Filtered ones may be meant for different tensors; the plan of the merge tells.
    given = [
        name
        for name in RANK_RULES
        if place.model is None and name in place.settings and not conditions(place.settings[name])
    ]
    if len(given) > 1:
        yield problem(
            f"{place.name(given[0])}: {' and '.join(given)} are two rank rules at once",
            "keep one of them",
        )


def _check_rank(place: Place) -> Iterator[Finding]:
    """Report ranks that are no numbers of directions; most of them are ratios."""
    if place.model is not None or "rank" not in place.settings:
        return
    for value in _odd_ranks(place.settings["rank"]):
        yield problem(
            f"{place.name('rank')}: a rank is a whole number of directions, got {value!r}",
            "did you mean rank_ratio?" if 0 < value < 1 else f"write {int(value)}",
        )


def _odd_ranks(setting: ParameterSetting) -> Iterator[float]:
    """The ranks that are not whole, but for those of gradients: layers in between have such."""
    for values, is_gradient in _alternatives(setting):
        for value in values:
            if 0 < value < 1 or (value > 1 and value % 1 and not is_gradient):
                yield value


def _check_lambda(place: Place) -> Iterator[Finding]:
    """Report a lambda that was chosen for another method: weak along the whole gradient."""
    if place.model is not None:
        return
    for values, _ in _alternatives(place.settings.get("lambda", [])):
        if values and 0 < max(values) < _LOW_LAMBDA:
            yield warning(
                f"{place.name('lambda')}: {max(values):g} leaves little but the plain average",
                f"a lambda of {max(values):g} fits task_arithmetic; CART's usual values are 1 to 3",
            )


def _alternatives(setting: ParameterSetting) -> Iterator[tuple[list[float], bool]]:
    """For each filter, or for all tensors: the finite numbers, and whether they are a gradient."""
    for choice in conditions(setting) or [setting]:
        inner = choice.value if isinstance(choice, ConditionalParameter) else choice
        numbers = [
            value
            for value in scalars(inner)
            if isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
        ]
        yield numbers, isinstance(inner, list)
