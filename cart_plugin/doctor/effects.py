"""Checks of what a recipe's parameters do to the tensors of a merge."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from mergekit.merge_methods.base import MergeMethod

from cart_plugin.doctor.findings import Finding, ok, problem, warning
from cart_plugin.doctor.layout import Recipe, conditions, places
from cart_plugin.doctor.merges import Merge
from cart_plugin.doctor.parameters import is_cart
from cart_plugin.doctor.silent import check_divisors
from cart_plugin.linalg.rules import RANK_RULES
from cart_plugin.wording import count, some

_MATRIX_PARAMETERS = {*RANK_RULES, "lambda", "center", "svd", "seed"}  # without effect elsewhere


def check_effects(merges: Sequence[Merge], config: Recipe, method: MergeMethod) -> list[Finding]:
    """Check parameters for conflicts and for those without effect; sum up what they do.

    Args:
        merges: the tensors of the result that an input holds.
        config: the recipe.
        method: its merge method.
    """
    findings = list(_check_filters(merges, config, method))
    if is_cart(method):
        conflicts = [*_check_rank_rules(merges), *_check_weights(merges)]
        findings += conflicts or [*_check_counting(merges), *_summary(merges)]
    else:
        merged = ok(f"{count(len(merges), 'tensor')} merged with {method.spec.name}")
        findings += list(check_divisors(merges, method.spec.name)) or [merged]
    return findings


def _check_filters(
    merges: Sequence[Merge], config: Recipe, method: MergeMethod
) -> Iterator[Finding]:
    """Report filters without effect: each is looked for in the names, letter by letter."""
    names = [merge.planned.name for merge in merges]
    if is_cart(method):
        matrices = [merge.planned.name for merge in merges if merge.can_be_decomposed]
    else:
        matrices = names
    for place in places(config):
        for name, setting in place.settings.items():
            for condition in conditions(setting):
                text = condition.filter
                if text is None or text == "*" or any(text in tensor for tensor in matrices):
                    continue
                matched = [tensor for tensor in names if text in tensor]
                if not matched:
                    fact = "matches no tensor"
                elif name in _MATRIX_PARAMETERS:
                    fact = f"matches only tensors that are averaged anyway ({some(matched, 1)})"
                else:
                    continue
                example = (matrices or names)[len(matrices or names) // 2]
                yield warning(
                    f"{place.name(name)}: the filter {text} {fact}",
                    f"write part of the names of the tensors meant, such as {example}",
                )


def _check_rank_rules(merges: Sequence[Merge]) -> Iterator[Finding]:
    """Report tensors for which the recipe's filters or levels leave two rank rules."""
    conflicts: dict[str, list[str]] = defaultdict(list)
    for merge in merges:
        if len(merge.rank_rules) > 1:
            conflicts[" and ".join(merge.rank_rules)].append(merge.planned.name)
    for rules, names in conflicts.items():
        yield problem(
            f"{rules} both hold for {count(len(names), 'tensor')}: {some(names)}",
            "use one rank rule in the whole recipe, with a filter for each kind of tensor",
        )


def _check_weights(merges: Sequence[Merge]) -> Iterator[Finding]:
    """Report tensors whose models' weights leave nothing to average."""
    names = [
        merge.planned.name
        for merge in merges
        if merge.is_floating
        and len(merge.tuned) > 1
        and sum(merge.planned.weights.get(label, 1.0) for label in merge.tuned) <= 0
    ]
    if names:
        yield problem(
            f"the models' weights sum to 0 or less for {count(len(names), 'tensor')}: "
            f"{some(names)}",
            "give at least one model a positive weight for every tensor",
        )


def _check_counting(merges: Sequence[Merge]) -> Iterator[Finding]:
    """Report decomposed tensors for which weights of 0 leave less than three models."""
    names = [
        merge.planned.name
        for merge in merges
        if merge.is_decomposed
        and not merge.takes_base
        and len(merge.counting) < 3
        # Two models in the recipe or in the files are reported there.
        and len(merge.tuned) >= 3
    ]
    if names:
        yield warning(
            f"weights of 0 leave fewer than three models for {count(len(names), 'tensor')} "
            f"({some(names)}): there cart is plain averaging, at any rank",
            "give three models a weight that is not 0, or set rank_ratio: 0 for these tensors",
        )


def _summary(merges: Sequence[Merge]) -> Iterator[Finding]:
    """Sum up what `cart` will do with the tensors."""
    decomposed = [merge for merge in merges if merge.is_decomposed]
    copied = sum(not merge.is_floating for merge in merges)
    averaged = len(merges) - len(decomposed) - copied
    fact = (
        f"{count(len(merges), 'tensor')}: {len(decomposed):,} decomposed, {averaged:,} averaged"
        + (f", {copied:,} copied" if copied else "")
    )
    if not decomposed:
        yield warning(
            f"{fact}: the result is the plain average",
            "set a rank_ratio above 0 for the attention and MLP weights",
        )
        return
    settings: dict[str, list[float]] = defaultdict(list)
    yield from _base_in_use(decomposed)
    for merge in decomposed:
        shown = merge.rank_rules or {"rank_ratio": merge.rule.rank_ratio}
        if "lambda" in merge.planned.parameters:
            shown["lambda"] = merge.planned.parameters["lambda"]
        for name, value in shown.items():
            settings[name].append(value)
    yield ok(f"{fact} ({', '.join(_range(*item) for item in settings.items())})")


def _base_in_use(decomposed: Sequence[Merge]) -> Iterator[Finding]:
    """What becomes of the base model with `cart_auto`, where there is one."""
    informed = [merge for merge in decomposed if merge.has_base and merge.is_auto]
    taking = sum(merge.takes_base for merge in informed)
    if taking and all(merge.looks_for_low_rank for merge in informed):
        yield ok(
            "the base model is only asked whether adapters have made the models: five and more "
            "merge better around their average"
        )
    elif taking and all(merge.is_around_base for merge in informed):
        yield ok(
            "center is the base model: cart_auto adds its sum to that, and the average has no part "
            "(its usual way with a base is without a center)"
        )
    elif taking:
        yield ok(
            f"the base model shows where the tasks' inputs lie in {count(taking, 'tensor')}"
            + ("" if taking == len(decomposed) else f" of {len(decomposed):,} decomposed")
        )
    elif informed:
        yield ok("the base model is not used: center says so")


def _range(name: str, values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{name} {low:g}" if low == high else f"{name} {low:g} to {high:g}"
