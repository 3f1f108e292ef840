"""Checks of a planned merge against what its inputs hold."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import MergeMethod
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig

from cart_plugin.checkpoints.placement import is_computed, without_place
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.doctor import formats, likeness
from cart_plugin.doctor.advice import flat, in_one_format, lacks_a_head, modules
from cart_plugin.doctor.buffers import check_buffers
from cart_plugin.doctor.effects import check_effects
from cart_plugin.doctor.findings import Finding, Level, problem, warning
from cart_plugin.doctor.layout import Recipe, groups
from cart_plugin.doctor.merges import Merge, vocabulary_rows
from cart_plugin.doctor.planning import PlannedTensor, outside_class, unreached
from cart_plugin.doctor.silent import check_casts, check_contributors
from cart_plugin.wording import count, some


def check_plan(
    matched: Sequence[Merge],
    checkpoints: Mapping[str, Checkpoint],
    config: Recipe,
    method: MergeMethod,
    *,
    completed: bool = False,
    truncates: bool = False,
) -> list[Finding]:
    """Check a plan for losses, mismatches and settings without effect; sum up what it will do.

    Args:
        matched: the tensors of the result, from `merges.match`.
        checkpoints: the inputs by label.
        config: the recipe.
        method: its merge method.
        completed: `mergekit-cart merge` does it.
        truncates: with mergekit's `--unsafe-truncate-embeddings`.
    """
    plan = [merge.planned for merge in matched]
    merges = [merge for merge in matched if merge.inputs]
    findings = list(check_contributors(merges, checkpoints, config))
    findings = findings or list(_check_lacking(matched, checkpoints, config))
    rows = vocabulary_rows(merges)
    if any(finding.level is Level.PROBLEM for finding in findings):
        # What is left over is the same mismatch, seen from the other side; but for what no plan
        # tells.
        return findings + likeness.check(checkpoints, config, rows, completed=completed)
    findings += _check_losses(plan, checkpoints, config)
    findings += _check_shapes(merges, config, truncates=truncates)
    whole = not any(finding.of_architecture for finding in findings)
    findings += likeness.check(checkpoints, config, rows, aligns=whole, completed=completed)
    if not whole:
        return findings  # of the tensors that the parameters meet, these are but some
    findings += check_casts(merges, checkpoints, config)
    if not completed:
        findings += check_buffers(merges, checkpoints, config)
    return findings + check_effects(merges, config, method)


def _other_ways(
    config: Recipe, checkpoints: Mapping[str, Checkpoint], lacking: Sequence[str] = ()
) -> str:
    """What to do where mergekit knows an architecture by other tensors than its models have."""
    way = formats.repair(config, checkpoints)
    if not way and lacking and all(lacks_a_head(checkpoints[label]) for label in lacking):
        way = "save the models with their head (the `...For...` class)"
    return f"{way}; or {flat(config)}" if way else flat(config)


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
        elif all(formats.has_in_other(checkpoints[label], tensors) for label in labels) and (
            way := in_one_format(config, checkpoints)
        ):
            yield problem(
                f"{who} {what} by the names that others have: the models are saved in two formats",
                way,
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
        fact = (
            f"mergekit would silently drop {len(in_all):,} of {held:,} tensors, for example "
            f"{some(in_all)}"
        )
        if unnamed := _unnamed_modules(config):
            yield problem(
                f"{fact}: the recipe's `modules:` leaves out {some(unnamed)}",
                f"name all there (`{unnamed[0]}: {{models: [...]}}`), or merge whole models under "
                "`models:`",
            )
        else:
            yield problem(
                f"{fact}: transformers {_transformers_version()} names them differently",
                _other_ways(config, checkpoints),
                of_architecture=True,
            )
    if in_some:
        yield warning(
            f"{count(len(in_some), 'tensor')} of the models will not be in the result: "
            f"{some(in_some)}",
            "make sure that is meant; task heads are left out like this",
        )


def _unnamed_modules(config: Recipe) -> list[str]:
    """The parts of the architecture that a recipe of modules does not name."""
    named = config.modules if isinstance(config, MergeConfiguration) else None
    return [name for name in modules(config) if name not in named] if named else []


def _transformers_version() -> str:
    import transformers

    return str(transformers.__version__)


def _check_shapes(merges: Sequence[Merge], config: Recipe, *, truncates: bool) -> Iterator[Finding]:
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
        if vocabulary and truncates:
            yield warning(
                f"{count(len(found), 'table')} of embeddings will be cut to the smallest: "
                f"{names[0]} is {shapes_text}",
                "make sure that all models number their tokens alike; a tokenizer section of the "
                "recipe aligns them and needs no --unsafe-truncate-embeddings",
            )
            continue
        yield problem(
            f"the shapes of {count(len(found), 'tensor')} differ: {names[0]} is {shapes_text}"
            + (f"; also {some(names[1:])}" if names[1:] else ""),
            "add `tokenizer: {source: union}` (or base), which aligns the vocabularies"
            if vocabulary
            else "merge models of one architecture and size; leave heads of different sizes out",
        )


def _without(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return shape if axis is None else shape[:axis] + shape[axis + 1 :]
