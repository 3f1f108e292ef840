"""Task vectors with a coefficient each, in the wrappers whose coefficients FusionBench adapts.

A merged model is ``centre + sum_t c_t * V_t``, with one coefficient a task, or one a task and
parameter (arXiv 2310.02575). In CART the centre is the average and the ``V_t`` are the truncated
centred task vectors; what is not decomposed keeps its whole centred difference.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel
from fusion_bench.models.wrappers.task_wise_fusion import TaskWiseMergedModel
from torch import Tensor, nn

from cart_plugin.errors import CartError
from cart_plugin.fusion_bench.base import BASE, Fleet
from cart_plugin.merging.indexing import index_tensors
from cart_plugin.merging.inputs import check_finite, check_same_tensors
from cart_plugin.merging.kept import Kept
from cart_plugin.merging.settings import CartSettings
from cart_plugin.merging.state_dicts import merge_state_dicts

GRANULARITIES = ("layer", "task")


@dataclass(frozen=True)
class Parts:
    """What a merged model consists of.

    Attributes:
        centre: every tensor of the state dict.
        vectors: one a task, of the parameters only: buffers have no coefficients.
        start: the coefficients' first values, one a task.
    """

    centre: dict[str, Tensor] = field(default_factory=dict)
    vectors: list[dict[str, Tensor]] = field(default_factory=list)
    start: list[float] = field(default_factory=list)


def cart_parts(fleet: Fleet, settings: CartSettings) -> Parts:
    """The average of a pool's models, and their truncated centred task vectors.

    A model's coefficients start at lambda, times its weight where it has one (scaled to mean 1),
    so that the first merged model is that of ``method=cart`` at the same rank rule.

    Raises:
        CartError: models that are no modules, and as `cart_plugin.merging.indexing.index_tensors`.
    """
    model = fleet.models[fleet.names[0]]
    if not isinstance(model, nn.Module):
        raise CartError(
            f"{fleet.names[0]} is a {type(model).__name__}: AdaMerging runs the models, give it a "
            "pool that loads modules"
        )
    shared = aliases(model)
    parameters = dict(model.named_parameters())
    parts = Parts(vectors=[{} for _ in fleet.names])
    for name, tensors in fleet.tensors("CART task vectors"):
        home, dtype = fleet.home(name), next(iter(tensors.values())).dtype
        if name in shared:
            continue
        if name not in parameters:
            merged = merge_state_dicts(
                {task: {name: tensor} for task, tensor in tensors.items()},
                settings,
                weights=fleet.weights,
                decompose=fleet.decompose,
                kept=Kept(),  # not asked: buffers have no coefficients
            )
            parts.centre[name] = merged[name].to(home)
            continue
        indexed = index_tensors(
            list(tensors.values()),
            settings,
            weights=fleet.weights,
            name=name,
            models=fleet.names,
            decompose=fleet.decompose(name, parameters[name].shape),
        )
        parts.centre[name] = indexed.centre.to(home, dtype)
        for index, vector in enumerate(parts.vectors):
            vector[name] = indexed.difference(index).to(home, dtype)
    states = fleet.states[fleet.names[0]]
    parts.centre.update({name: parts.centre[shared[name]] for name in shared if name in states})
    weights = fleet.weights or [1.0] * len(fleet.names)
    scale = float(settings.lambda_) * len(weights) / sum(weights)
    parts.start.extend(scale * weight for weight in weights)
    return parts


def full_parts(
    models: Mapping[str, nn.Module], pretrained: Mapping[str, Tensor], start: float
) -> Parts:
    """The pretrained model and the whole task vectors ``W_t - pretrained``: plain AdaMerging.

    Args:
        models: the fine-tuned models.
        pretrained: the pretrained model's state dict.
        start: the coefficients' first value.

    Raises:
        CartError: models or a pretrained model of other architectures, NaN or infinite values.
    """
    states = {task: model.state_dict() for task, model in models.items()}
    check_same_tensors({**states, BASE: pretrained})
    parts = Parts(dict(pretrained), [{} for _ in models], [start] * len(models))
    for vector, (task, model) in zip(parts.vectors, models.items(), strict=True):
        for name, parameter in model.named_parameters():
            base = pretrained[name]
            if parameter.shape != base.shape:
                raise CartError(
                    f"tensor {name!r} is {tuple(base.shape)} in the pretrained model but "
                    f"{tuple(parameter.shape)} in {task}; merged models must have the same "
                    "architecture"
                )
            tensor = parameter.detach()
            vector[name] = tensor - base.to(parameter.device)
            check_finite(vector[name], [task, BASE], [tensor, base], f"tensor {name!r}")
    return parts


def aliases(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters, with the name under which each is listed first."""
    first: dict[Tensor, str] = {}
    shared = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            shared[name] = first[parameter]
    return shared


class TaskVector(nn.Module):
    """Tensors as frozen parameters, under the names that they have in a model."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            holder: nn.Module = self
            for part in path:
                if part not in dict(holder.named_children()):
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            holder.register_parameter(last, nn.Parameter(tensor, requires_grad=False))


class _Tied:
    """Gives a tied parameter its merged value under all of its names.

    FusionBench's wrappers merge its first name only, so that a forward pass reads the others
    unmerged, and ``functional_call`` refuses them with ``tie_weights``.
    """

    tied: dict[str, str]

    def merge_weights(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Merge with the coefficients as they are now."""
        merged: dict[str, Tensor] = super().merge_weights(*args, **kwargs)  # type: ignore[misc]
        merged.update({name: merged[first] for name, first in self.tied.items() if name in merged})
        return merged


class LayerWise(_Tied, LayerWiseMergedModel):
    """One coefficient a task and parameter: ``merge_weight`` is (tasks, parameters)."""


class TaskWise(_Tied, TaskWiseMergedModel):
    """One coefficient a task: ``merge_weight`` is (tasks,)."""


def wrapped(
    model: nn.Module, vectors: Sequence[Mapping[str, Tensor]], start: Sequence[float], by: str
) -> LayerWise | TaskWise:
    """A model that holds the centre, and task vectors, with coefficients to adapt.

    Args:
        model: the centre; becomes the merged model in the end.
        vectors: one a task, each with the same parameters.
        start: the coefficients' first values, one a task.
        by: one of `GRANULARITIES`.
    """
    coefficients = torch.tensor(list(start), dtype=torch.float32)
    if by == "layer":
        coefficients = coefficients[:, None].repeat(1, len(vectors[0]))
    kind = LayerWise if by == "layer" else TaskWise
    # The wrapper would subtract the centre from models of its own; ours are differences already,
    # and truncated.
    module = kind(coefficients, model, [], clamp_weights=False, tie_weights=True, strict=False)
    # By the model's own order, which is that of saved coefficients.
    order = [name for name, _ in model.named_parameters() if name in vectors[0]]
    module.task_vectors = nn.ModuleList(
        TaskVector({name: vector[name] for name in order}) for vector in vectors
    )
    module.tied = aliases(model)
    return module


def save_coefficients(path: Path, coefficients: Tensor) -> None:
    """Write coefficients as FusionBench's AdaMerging does: one tensor, as of ``torch.save``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(coefficients.detach().cpu(), file)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_coefficients(path: Path, shape: Sequence[int]) -> Tensor:
    """Read coefficients that `save_coefficients` or FusionBench's AdaMerging wrote.

    Args:
        path: the file.
        shape: what the pool's models and the granularity ask for.

    Raises:
        CartError: something else in it, another shape, or values that are not finite.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CartError(f"{path} does not load as a tensor of coefficients: {error}") from error
    if not isinstance(found, Tensor) or found.shape != torch.Size(shape):
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise CartError(
            f"{path} holds {what}, but these models need coefficients of shape {tuple(shape)}: "
            "(tasks, parameters) with granularity layer, (tasks,) with granularity task"
        )
    if not bool(torch.isfinite(found).all()):
        raise CartError(f"{path} holds coefficients that are NaN or infinite; adapt them again")
    return found.detach().to(torch.float32)
