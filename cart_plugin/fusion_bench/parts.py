"""The centre and the task vectors of a pool's models, for merges that adapt.

CART's are the average (or the pretrained model) and truncated differences from it, as factors; of
plain AdaMerging (arXiv 2310.02575) they are the pretrained model and whole differences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cart_plugin.errors import CartError
from cart_plugin.fusion_bench.base import BASE
from cart_plugin.fusion_bench.fleet import Fleet
from cart_plugin.fusion_bench.merged import LowRankTerm, Term, Whole
from cart_plugin.merging.directions import directions_of
from cart_plugin.merging.indexing import index_tensors
from cart_plugin.merging.inputs import (
    check_finite,
    check_range,
    check_same_tensors,
    check_whole_weights,
)
from cart_plugin.merging.kept import Kept
from cart_plugin.merging.settings import CartSettings
from cart_plugin.merging.state_dicts import merge_state_dicts


@dataclass(frozen=True)
class Parts:
    """What a merged model consists of.

    Attributes:
        centre: every tensor of the state dict.
        terms: of the parameters that adapt; buffers have no coefficients.
        start: the coefficients' first values, one a task.
    """

    centre: dict[str, Tensor]
    terms: dict[str, Term]
    start: list[float]


def cart_parts(fleet: Fleet, settings: CartSettings, candidates: float | None = None) -> Parts:
    """The centre of a pool's models, and their truncated task vectors.

    A model's coefficients start at lambda (at 1 for ``auto``), times its weight where it has one
    (scaled to mean 1), so that the first merged model is that of ``method=cart``; with ``auto`` it
    is ``cart_auto``'s. What is not decomposed keeps its whole difference
    from the average.

    Args:
        fleet: the models, which are modules.
        settings: of CART.
        candidates: share of the singular directions that a mask may choose from; no masks if None.
            With masks, matrices that are not decomposed stay at the average, so that no task has
            dense ones.

    Raises:
        CartError: as `cart_plugin.merging.directions.directions_of`.
    """
    model: nn.Module = fleet.models[fleet.names[0]]
    parameters, centre = dict(model.named_parameters()), {}
    terms: dict[str, Term] = {}
    average = replace(settings, center="average")
    masked = candidates is not None
    for name, tensors in fleet.tensors("CART task vectors"):
        home, dtype = fleet.home(name), next(iter(tensors.values())).dtype
        values, base = list(tensors.values()), fleet.base_tensor(name)
        shape = values[0].shape
        decompose = fleet.decompose(name, shape) and values[0].numel() > 0
        is_dense = not decompose and sum(size > 1 for size in shape) > 1
        if name not in parameters or (masked and is_dense):
            merged = merge_state_dicts(
                {task: {name: tensor} for task, tensor in tensors.items()},
                settings,
                weights=fleet.weights,
                base=None if base is None else {name: base},
                decompose=fleet.decompose,
                kept=Kept(),  # not asked: what has no coefficients is no part of the method
            )
            centre[name] = fleet.at_home(name, merged[name], dtype)
            continue
        term: Term
        if decompose:
            found = directions_of(
                values,
                settings,
                weights=fleet.weights,
                base=base,
                name=name,
                models=fleet.names,
                candidates=candidates,
                turned=name in fleet.turned,
            )
            term = LowRankTerm(found, dtype, masked=masked)
        else:
            indexed = index_tensors(
                values,
                average,
                weights=fleet.weights,
                name=name,
                models=fleet.names,
                decompose=False,
            )
            vectors = [indexed.difference(i).to(dtype) for i in range(len(values))]
            term = Whole(indexed.centre, vectors, dtype)
        terms[name] = term.to(home)
        centre[name] = term.centre.to(dtype)
    weights = fleet.weights or [1.0] * len(fleet.names)
    scale = 1.0 if settings.lambda_ == "auto" else float(settings.lambda_)
    start = [scale * len(weights) * weight / sum(weights) for weight in weights]
    return Parts(fleet.whole(centre), terms, start)


def full_parts(
    models: Mapping[str, nn.Module], pretrained: Mapping[str, Tensor], start: float
) -> Parts:
    """The pretrained model and the whole task vectors ``W_t - pretrained``: plain AdaMerging.

    Args:
        models: the fine-tuned models.
        pretrained: the pretrained model's state dict.
        start: the coefficients' first value.

    Raises:
        CartError: models or a pretrained model of other architectures, NaN or infinite values,
            buffers that the models' dtype cannot hold.
    """
    states = {task: model.state_dict() for task, model in models.items()}
    check_same_tensors({**states, BASE: pretrained})
    check_whole_weights(states)
    parts = Parts(dict(pretrained), {}, [start] * len(models))
    first = next(iter(models.values()))
    own = next(iter(states.values()))
    for name in pretrained.keys() - dict(first.named_parameters(remove_duplicate=False)).keys():
        parts.centre[name] = pretrained[name].to(own[name].dtype)
        check_range(parts.centre[name], f"tensor {name!r}")
    for name, parameter in first.named_parameters():
        base, vectors = pretrained[name].to(parameter.device), []
        for task, state in states.items():
            tensor = state[name]
            if tensor.shape != base.shape:
                raise CartError(
                    f"tensor {name!r} is {tuple(base.shape)} in the pretrained model but "
                    f"{tuple(tensor.shape)} in {task}; merged models must have the same "
                    "architecture"
                )
            vectors.append(tensor - base)
            check_finite(vectors[-1], [task, BASE], [tensor, base], f"tensor {name!r}")
        centre = base.to(torch.promote_types(base.dtype, torch.float32))
        parts.terms[name] = Whole(centre, vectors, parameter.dtype)
    return parts
