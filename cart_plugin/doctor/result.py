"""Checks of a planned merge against what its inputs hold."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import MergeMethod
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig

from cart_plugin.checkpoints.headers import TensorInfo
from cart_plugin.checkpoints.placement import is_computed, without_place
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.doctor import formats, likeness
from cart_plugin.doctor.advice import FLAT, lacks_a_head
from cart_plugin.doctor.findings import Finding, Level, count, ok, problem, some, warning
from cart_plugin.doctor.layout import Recipe, conditions, groups, places
from cart_plugin.doctor.parameters import is_cart
from cart_plugin.doctor.planning import PlannedTensor, outside_class, source, unreached
from cart_plugin.doctor.silent import check_casts, check_contributors, check_divisors
from cart_plugin.linalg.rules import RANK_RULES, RankRule
from cart_plugin.mergekit import settings_of
from cart_plugin.merging.tensors import is_decomposed, matrix_shape

_MATRIX_PARAMETERS = {*RANK_RULES, "lambda", "center", "svd", "seed"}  # without effect elsewhere


@dataclass(frozen=True)
class Merge:
    """A planned tensor, what the inputs hold for it by label, and which of them lack it."""

    planned: PlannedTensor
    inputs: Mapping[str, TensorInfo]
    lacking: Sequence[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the first input."""
        return next(iter(self.inputs.values())).shape

    @property
    def is_floating(self) -> bool:
        """Whether the tensor is merged; integer buffers are copied."""
        return all(info.is_floating for info in self.inputs.values())

    @property
    def is_decomposed(self) -> bool:
        """Whether `cart` decomposes the tensor as the recipe has it."""
        return self.can_be_decomposed and not self.rule.keeps_nothing

    @property
    def rank_share(self) -> float | None:
        """The share of the full rank that is kept, or None if that depends on the values."""
        _, m, n = matrix_shape(self.planned.name, self.shape)
        rank = self.rule.fixed_rank(m, n)
        return None if rank is None else rank / min(m, n)

    @property
    def can_be_decomposed(self) -> bool:
        """Whether the tensor is one that `cart` decomposes, as its mergekit adapter decides it."""
        return (
            self.is_floating
            and self.planned.vocabulary_axis is None
            and is_decomposed(self.planned.name, self.shape)
            and len(self.tuned) > 1
        )

    @property
    def tuned(self) -> list[str]:
        """The inputs that are merged: those that hold the tensor, but the base model."""
        return [label for label in self.inputs if label != self.planned.base]

    @property
    def counting(self) -> list[str]:
        """The merged inputs whose weight for this tensor is not 0."""
        return [label for label in self.tuned if self.planned.weights.get(label, 1.0) != 0]

    @property
    def takes_base(self) -> bool:
        """Whether the base model has a part in the result."""
        settings = settings_of(self.planned.parameters)
        return settings.takes_base and (
            settings.center == "base" or self.planned.base in self.inputs
        )

    @property
    def rule(self) -> RankRule:
        """The rank rule for this tensor: the recipe's, or the method's own."""
        return settings_of(self.planned.parameters).rule

    @property
    def rank_rules(self) -> dict[str, Any]:
        """The rank rules that the recipe sets for this tensor; one or none, if it is right."""
        given = {name: self.planned.parameters[name] for name in RANK_RULES}
        return {name: value for name, value in given.items() if value is not None}


def match(plan: Sequence[PlannedTensor], checkpoints: Mapping[str, Checkpoint]) -> list[Merge]:
    """Find the tensors of a plan in its inputs."""
    merges = []
    for planned in plan:
        found = {label: source(planned, checkpoints[label]) for label in planned.sources}
        held = {label: info for label, info in found.items() if info is not None}
        merges.append(Merge(planned, held, [label for label in found if label not in held]))
    return merges


def check_plan(
    matched: Sequence[Merge],
    checkpoints: Mapping[str, Checkpoint],
    config: Recipe,
    method: MergeMethod,
) -> list[Finding]:
    """Check a plan for losses, mismatches and settings without effect; sum up what it will do.

    Args:
        matched: the tensors of the result, from `match`.
        checkpoints: the inputs by label.
        config: the recipe.
        method: its merge method.
    """
    plan = [merge.planned for merge in matched]
    merges = [merge for merge in matched if merge.inputs]
    findings = list(check_contributors(merges, checkpoints))
    findings = findings or list(_check_lacking(matched, checkpoints, config))
    if any(finding.level is Level.PROBLEM for finding in findings):
        # What is left over is the same mismatch, seen from the other side.
        return findings
    findings += _check_losses(plan, checkpoints, config)
    findings += _check_shapes(merges, config)
    findings += check_casts(merges, checkpoints, config)
    findings += likeness.check(checkpoints, config, _vocabulary_rows(merges))
    findings += _check_filters(merges, config, method)
    if is_cart(method):
        conflicts = [*_check_rank_rules(merges), *_check_weights(merges)]
        findings += conflicts or [*_check_counting(merges), *_summary(merges)]
    else:
        merged = ok(f"{count(len(merges), 'tensor')} merged with {method.spec.name}")
        findings += list(check_divisors(merges, method.spec.name)) or [merged]
    return findings


def _other_ways(
    config: Recipe, checkpoints: Mapping[str, Checkpoint], lacking: Sequence[str] = ()
) -> str:
    """What to do where mergekit knows an architecture by other tensors than its models have."""
    way = formats.repair(config, checkpoints)
    if not way and lacking and all(lacks_a_head(checkpoints[label]) for label in lacking):
        way = "save the models with their head (the `...For...` class)"
    return f"{way}; or {FLAT}" if way else FLAT


def _vocabulary_rows(merges: Sequence[Merge]) -> int | None:
    """How many tokens all inputs have a row for; None if that cannot be told."""
    counts = [
        info.shape[axis]
        for merge in merges
        if (axis := merge.planned.vocabulary_axis) is not None
        for info in merge.inputs.values()
        if axis < len(info.shape)
    ]
    return min(counts, default=None)


def _check_lacking(
    matched: Sequence[Merge], checkpoints: Mapping[str, Checkpoint], config: Recipe
) -> Iterator[Finding]:
    """Report tensors that the plan takes from inputs which do not have them."""
    unused = _unused(matched, checkpoints)
    lacking: dict[tuple[str, bool, bool, bool], list[str]] = defaultdict(list)
    for merge in matched:
        name, optional = merge.planned.name, merge.planned.optional
        for label in merge.lacking:
            lacking[label, optional, bool(merge.inputs), name in unused].append(name)
    # Inputs that lack the same tensors, in one line.
    alike: dict[tuple[tuple[str, ...], bool, bool, bool], list[str]] = defaultdict(list)
    for (label, optional, elsewhere, outside), names in lacking.items():
        alike[tuple(sorted(names)), optional, elsewhere, outside].append(label)
    for (tensors, optional, elsewhere, outside), labels in alike.items():
        who = f"model {labels[0]} lacks" if len(labels) == 1 else f"models {some(labels)} lack"
        what = f"{count(len(tensors), 'tensor')} ({some(tensors)})"
        if isinstance(config, RawPyTorchMergeConfig):
            yield problem(
                f"{who} {what} that others have; mergekit-pytorch stops at them",
                "pass --tensor-intersection to leave them out of the result, or --tensor-union "
                "to merge them from the models that have them",
            )
        elif not optional and (outside or not elsewhere):
            yield problem(
                f"{who} {what} that mergekit requires of this architecture"
                + (", of no use to the models that hold them" if elsewhere else ""),
                _other_ways(config, checkpoints, labels),
                of_architecture=True,
            )
        elif not optional:
            yield problem(
                f"{who} {what} that others have; mergekit stops at them",
                "merge models of one architecture and leave their task heads out; or merge "
                "weight files with mergekit-pytorch --tensor-intersection",
            )
        elif elsewhere:
            yield warning(
                f"{who} {what} that others have; they are merged from those alone",
                "make sure that is meant",
            )


def _unused(matched: Sequence[Merge], checkpoints: Mapping[str, Checkpoint]) -> set[str]:
    """Tensors that only some inputs hold, in the class of none of which they have a place."""
    partial = [merge for merge in matched if merge.lacking and not merge.planned.optional]
    found = {merge.planned.name for merge in partial if merge.inputs}
    for label in {label for merge in partial for label in merge.inputs}:
        held = [merge.planned for merge in partial if label in merge.inputs]
        found -= {planned.name for planned in held} - outside_class(held, checkpoints[label])
    return found


def _check_losses(
    plan: Sequence[PlannedTensor], checkpoints: Mapping[str, Checkpoint], config: Recipe
) -> Iterator[Finding]:
    """Report tensors of the inputs that would be missing in the result."""
    whole = isinstance(config, RawPyTorchMergeConfig) or not any(
        ".sources" in f".{group.label}" for group in groups(config)
    )
    used = {label for planned in plan for label in planned.sources}
    lost: Counter[str] = Counter()
    foreign: set[str] = set()
    for label in used:
        left = unreached(plan, checkpoints[label], whole_models=whole)
        outside = set(without_place(checkpoints[label], left))
        lost.update(name for name in left if name not in outside)
        tensors = checkpoints[label].tensors
        foreign |= {name for name in outside if not is_computed(name, tensors[name])}
    in_all = sorted(name for name, times in lost.items() if times == len(used))
    in_some = sorted({name for name, times in lost.items() if times < len(used)} | foreign)
    if in_all:
        held = len(checkpoints[next(iter(used))].tensors)
        yield problem(
            f"mergekit would silently drop {len(in_all):,} of {held:,} tensors, for example "
            f"{some(in_all)}: transformers {_transformers_version()} names them differently",
            _other_ways(config, checkpoints),
            of_architecture=True,
        )
    if in_some:
        yield warning(
            f"{count(len(in_some), 'tensor')} of the models will not be in the result: "
            f"{some(in_some)}",
            "make sure that is meant; task heads are left out like this",
        )


def _transformers_version() -> str:
    import transformers

    return str(transformers.__version__)


def _check_shapes(merges: Sequence[Merge], config: Recipe) -> Iterator[Finding]:
    """Report tensors whose shapes differ between the inputs."""
    aligned = isinstance(config, MergeConfiguration) and bool(
        config.tokenizer or config.tokenizer_source
    )
    differing: dict[bool, list[Merge]] = {True: [], False: []}
    for merge in merges:
        axis = merge.planned.vocabulary_axis
        shapes = {_without(info.shape, axis if aligned else None) for info in merge.inputs.values()}
        if len(shapes) > 1:
            # Tokenizers can be aligned; a model that is wider stays so.
            width = {_without(info.shape, axis) for info in merge.inputs.values()}
            differing[axis is not None and len(width) == 1].append(merge)
    for vocabulary, found in differing.items():
        if not found:
            continue
        by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for label, info in found[0].inputs.items():
            by_shape[info.shape].append(label)
        shapes_text = ", ".join(f"{shape} in {some(who)}" for shape, who in by_shape.items())
        names = [merge.planned.name for merge in found]
        yield problem(
            f"the shapes of {count(len(found), 'tensor')} differ: {names[0]} is {shapes_text}"
            + (f"; also {some(names[1:])}" if names[1:] else ""),
            "add `tokenizer: {source: union}` (or base), which aligns the vocabularies"
            if vocabulary
            else "merge models of one architecture and size; leave heads of different sizes out",
        )


def _without(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return shape if axis is None else shape[:axis] + shape[axis + 1 :]


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
    for merge in decomposed:
        shown = merge.rank_rules or {"rank_ratio": merge.rule.rank_ratio}
        if "lambda" in merge.planned.parameters:
            shown["lambda"] = merge.planned.parameters["lambda"]
        for name, value in shown.items():
            settings[name].append(value)
    yield ok(f"{fact} ({', '.join(_range(*item) for item in settings.items())})")


def _range(name: str, values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{name} {low:g}" if low == high else f"{name} {low:g} to {high:g}"
