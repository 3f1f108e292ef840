"""A merge as mergekit's own planner lays it out, compared with what the inputs hold.

mergekit plans from names that an architecture prescribes, not from the checkpoints: a tensor that
the plan does not reach is missing from the result, with exit code 0.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.architecture import get_architecture_info
from mergekit.architecture.conversion import can_convert_checkpoint_keys, convert_checkpoint_tensors
from mergekit.config import MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import GatherTensors, LoaderCache, SaveTensor
from mergekit.merge import _model_out_config
from mergekit.merge_methods.task_adapter import TensorDictWrapper
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge

from cart_plugin.checkpoints.agreement import StrangersError
from cart_plugin.checkpoints.headers import TensorInfo
from cart_plugin.checkpoints.placement import without_place
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.doctor.advice import (
    are_one_class,
    asks_for_code,
    in_one_format,
    is_of_recipe,
    way_out,
)
from cart_plugin.doctor.findings import Finding, problem
from cart_plugin.doctor.layout import Recipe
from cart_plugin.errors import CheckpointError, first_line

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result.

    Attributes:
        name: in the result.
        vocabulary_axis: the axis that counts tokens, if there is one.
        optional: mergekit goes on if an input lacks it.
        sources: for each input (as its label) the names it may have there, best first.
        parameters: the recipe's shared parameters, resolved for this tensor.
        weights: the models' weights for this tensor, if the method has such a parameter.
        base: the base model's label, if there is one.
    """

    name: str
    vocabulary_axis: int | None
    optional: bool
    sources: Mapping[str, tuple[str, ...]]
    parameters: Mapping[str, Any]
    weights: Mapping[str, float]
    base: str | None


def plan(
    config: Recipe, checkpoints: Mapping[str, Checkpoint], options: MergeOptions | None = None
) -> tuple[list[PlannedTensor] | None, list[Finding]]:
    """Let mergekit plan a merge of local models; nothing is loaded or written.

    Args:
        config: the recipe; left unchanged.
        checkpoints: its inputs by label.
        options: of the merge; mergekit's defaults if None.

    Returns:
        The tensors of the result, or None with the reason why mergekit could not plan.
    """
    try:
        with _quiet():
            if isinstance(config, RawPyTorchMergeConfig):
                # The union; which tensors some inputs lack is reported from the plan.
                tasks = plan_flat_merge(config, "unused", True, False, MergeOptions(quiet=True))
            else:
                options = (options or MergeOptions()).model_copy(update={"quiet": True})
                tasks = _plan_folders(config.model_copy(deep=True), checkpoints, options)
            # Some of mergekit's definitions list a tensor twice; the file holds it once.
            found = [planned_tensor(task) for task in tasks if isinstance(task, SaveTensor)]
            return list({tensor.name: tensor for tensor in found}.values()), []
    except StrangersError as error:
        advice = in_one_format(config, checkpoints)
        return None, [problem(error.fact, advice or error.advice, of_architecture=bool(advice))]
    except CheckpointError as error:  # of our own methods
        return None, [problem(error.fact, error.advice)]
    except Exception as error:  # mergekit raises whatever its assumptions run into
        if asks_for_code(error):
            return None, [
                problem(
                    "the models bring their own code, which is run with --trust-remote-code only",
                    "pass it to mergekit or `mergekit-cart merge` if you trust the code; doctor "
                    "itself does not run it",
                )
            ]
        return None, [
            problem(
                f"mergekit cannot plan this merge: {first_line(error)}",
                way_out(error, config, checkpoints),
                of_architecture=are_one_class(checkpoints) and not is_of_recipe(error),
            )
        ]


def _plan_folders(
    config: MergeConfiguration, checkpoints: Mapping[str, Checkpoint], options: MergeOptions
) -> list[Any]:
    cache = LoaderCache()
    cache.setup(options=options)
    for model in config.referenced_models():
        # Of `model+lora` the planner would load and fuse the weights, to see the names that the
        # model has without its adapter too.
        held = checkpoints[str(model)]
        index = ShardedTensorIndex(str(held.path), True, dict.fromkeys(held.tensors, ""), [])
        cache.loaders[model] = LazyTensorLoader(index)
    try:
        architecture = get_architecture_info(config, options)
        out_config = _model_out_config(
            config, architecture, trust_remote_code=options.trust_remote_code
        )
        planner = MergePlanner(config, architecture, options=options, out_model_config=out_config)
        return list(planner.plan_to_disk("unused"))
    finally:
        cache.loaders.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the planner's progress bars, log lines and warnings off the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def planned_tensor(task: SaveTensor) -> PlannedTensor:
    """What one of mergekit's tasks will save."""
    merge: Any = task.tensor_task
    gather = merge.gather_tensors
    if isinstance(gather, TensorDictWrapper):
        sources = {str(model): (load.tensor_name,) for model, load in gather.tensors.items()}
    else:
        gather = gather if isinstance(gather, GatherTensors) else gather.gather_tensors
        sources = {
            str(model): (info.name, *(info.aliases or ()), *(info.tied_names or ()))
            for model, info in gather.weight_info.items()
        }
    weights = {
        str(model): values["weight"]
        for model, values in merge.input_parameters.items()
        if "weight" in values.keys()  # noqa: SIM118 - mergekit's map has no __contains__
        if values["weight"] is not None
    }
    return PlannedTensor(
        name=task.tensor_name,
        vocabulary_axis=merge.output_weight.vocabulary_axis,
        optional=task.optional,
        sources=sources,
        parameters=dict(merge.parameters.items()),
        weights=weights,
        base=None if merge.base_model is None else str(merge.base_model),
    )


def source(planned: PlannedTensor, checkpoint: Checkpoint) -> TensorInfo | None:
    """The tensor of an input that goes into a planned one; None if the input lacks it.

    Where transformers names or stacks weights differently from their files (experts), shape and
    dtype are those after its conversion, as mergekit loads them.
    """
    names = planned.sources[checkpoint.name]
    for name in names:
        if name in checkpoint.tensors:
            return checkpoint.tensors[name]
    for name in names:
        candidates = _same_layer(name, checkpoint.tensors)
        with _quiet():
            if can_convert_checkpoint_keys(checkpoint.model_type, set(candidates), name):
                return _converted(checkpoint.model_type, candidates, name)
    return None


def _same_layer(target: str, tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
    # Conversions stay within a layer; trying all names of a large mixture takes minutes.
    layer = _LAYER.search(target)
    if layer is None:
        return tensors
    return {
        name: info
        for name, info in tensors.items()
        if (match := _LAYER.search(name)) and match.group(1) == layer.group(1)
    }


def _converted(
    model_type: str, candidates: Mapping[str, TensorInfo], name: str
) -> TensorInfo | None:
    stand_ins = {
        key: torch.empty(info.shape, dtype=info.dtype or torch.uint8, device="meta")
        for key, info in candidates.items()
    }
    tensor = convert_checkpoint_tensors(model_type, stand_ins, name)
    return None if tensor is None else TensorInfo(tuple(tensor.shape), tensor.dtype)


def unreached(
    tensors: Sequence[PlannedTensor], checkpoint: Checkpoint, *, whole_models: bool
) -> list[str]:
    """Names of an input's tensors that no planned tensor takes: they will be missing in the result.

    Args:
        tensors: the plan.
        checkpoint: one input.
        whole_models: the recipe merges whole models; of slices, only the kinds of tensors are
            compared, since layers that the recipe does not name are left out on purpose.
    """

    def kind(name: str) -> str:
        return name if whole_models else _LAYER.sub(".N.", name, count=1)

    # Of slices, what comes before and after the layers is taken from some of the models only.
    taken = {
        kind(name)
        for planned in tensors
        for label, names in planned.sources.items()
        if label == checkpoint.name or not whole_models
        for name in names
    }
    left = [name for name in checkpoint.tensors if kind(name) not in taken]
    left = [
        name
        for name in left
        # Old checkpoints hold such buffers; models compute them anew.
        if checkpoint.tensors[name].is_floating and not name.endswith("rotary_emb.inv_freq")
    ]
    return [name for name in left if not _feeds(name, checkpoint, taken, kind)]


def outside_class(tensors: Sequence[PlannedTensor], checkpoint: Checkpoint) -> set[str]:
    """Names of planned tensors that an input holds, and for which its own class has no place."""
    stored = {
        planned.name: name
        for planned in tensors
        for name in reversed(planned.sources[checkpoint.name])
        if name in checkpoint.tensors
    }
    found = set(without_place(checkpoint, list(stored.values())))
    return {planned for planned, name in stored.items() if name in found}


def _feeds(name: str, checkpoint: Checkpoint, taken: set[str], kind: Callable[[str], str]) -> bool:
    """Whether transformers' conversion turns a tensor into (a part of) one that is taken."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    reached = {name}
    for transform in get_checkpoint_conversion_mapping(checkpoint.model_type) or ():
        for current in tuple(reached):
            renamed, pattern = transform.rename_source_key(current)
            if pattern is None:
                continue
            reached.add(renamed)
            first, *others = transform.target_patterns or [""]
            for target in others:
                if first in renamed:
                    reached.add(renamed.replace(first, target, 1))
    return any(kind(candidate) in taken for candidate in reached)
