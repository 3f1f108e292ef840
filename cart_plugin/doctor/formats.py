"""The two formats that transformers saves a model in, and whether mergekit keeps all of the other.

`save_original_format=True` writes the names that checkpoints of the model have always had, False
those of today's classes. mergekit knows the one of some architectures, the other of others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from mergekit.architecture import arch_info_for_config

from cart_plugin.checkpoints import names
from cart_plugin.checkpoints.headers import TensorInfo
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.doctor import planning
from cart_plugin.doctor.layout import Recipe
from cart_plugin.errors import CartError


def repair(config: Recipe, checkpoints: Mapping[str, Checkpoint]) -> str:
    """Advice to save the models in their other format; empty where mergekit would lose that, too.

    Args:
        config: the recipe.
        checkpoints: the inputs by label, of which mergekit loses or lacks some tensors.
    """
    try:
        found = {label: _other(checkpoint) for label, checkpoint in checkpoints.items()}
    except Exception:  # no class, or no way back: whatever foreign code makes of it
        return ""
    others = {label: other for label, (other, _) in found.items()}
    to_original = {flag for _, flag in found.values()}
    if len(to_original) != 1 or not _is_whole(config, others, to_original=to_original == {True}):
        return ""
    return (
        "save each model again with model.save_pretrained(FOLDER, "
        f"save_original_format={to_original.pop()}) and merge those folders"
    )


def has_in_other(checkpoint: Checkpoint, tensors: Iterable[str]) -> bool:
    """Whether some tensors that a model lacks have other names in its format.

    Args:
        checkpoint: the model.
        tensors: their names.
    """
    try:
        own, other, _ = _formats(checkpoint)
    except Exception:  # as in `repair`
        return False
    return other.keys() - own >= set(tensors)


def _is_whole(config: Recipe, others: Mapping[str, Checkpoint], *, to_original: bool) -> bool:
    """Whether mergekit would keep all tensors of models that nobody has saved yet."""
    first = next(iter(others.values()))
    if arch_info_for_config(names.settings(first.path, first.name)) is None:
        # mergekit infers the architecture: it takes the names of the model's class.
        return not to_original
    plan, _ = planning.plan(config, others)
    if plan is None or any(
        planning.unreached(plan, it, whole_models=True) for it in others.values()
    ):
        return False
    return all(
        planned.optional or planning.source(planned, others[label]) is not None
        for planned in plan
        for label in planned.sources
    )


def _other(checkpoint: Checkpoint) -> tuple[Checkpoint, bool]:
    """A model as its other format would hold it, and whether that is the original one."""
    _, tensors, is_original = _formats(checkpoint)
    return replace(checkpoint, tensors=tensors), is_original


def _formats(checkpoint: Checkpoint) -> tuple[set[str], dict[str, TensorInfo], bool]:
    """Names in a model's format, tensors in its other one, and whether that is the original one.

    Raises:
        CartError: it has no other.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = names.meta_model(checkpoint.path, checkpoint.config, checkpoint.name)
    state = dict(model.state_dict())
    original = revert_weight_conversion(model, dict(state))  # as `save_pretrained` does
    if set(state) == set(original):
        raise CartError("both formats are the same")
    held = set(checkpoint.tensors)
    is_original = len(held & set(original)) >= len(held & set(state))
    own, other = (original, state) if is_original else (state, original)
    tensors = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in other.items()}
    return set(own), tensors, not is_original
