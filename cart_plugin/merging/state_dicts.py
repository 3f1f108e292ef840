"""Whole state dicts, merged one tensor at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from cart_plugin.errors import CartError, CartWarning
from cart_plugin.merging.cart import merge_tensors
from cart_plugin.merging.inputs import agreed_buffer, check_same_tensors, check_whole_weights
from cart_plugin.merging.kept import Kept
from cart_plugin.merging.settings import CartSettings
from cart_plugin.merging.tensors import is_decomposed


def merge_state_dicts(
    state_dicts: Mapping[str, Mapping[str, Tensor]] | Sequence[Mapping[str, Tensor]],
    settings: CartSettings | None = None,
    *,
    weights: Sequence[float] | None = None,
    base: Mapping[str, Tensor] | None = None,
    decompose: Callable[[str, torch.Size], bool] = is_decomposed,
    kept: Kept | None = None,
    turned: Collection[str] = (),
) -> dict[str, Tensor]:
    """Merge whole state dicts, one tensor at a time.

    Args:
        state_dicts: one a model, or a mapping from the models' names to them; all with the same
            tensors. Lazily loading mappings work: each tensor is asked for once, when it is due.
        settings: parameters of the method; the defaults if None.
        weights: one a model, as in `merge_tensors`.
        base: the base model's state dict, as in `merge_tensors`. As the centre it has all tensors;
            else those that are decomposed.
        decompose: which tensors to decompose, by name and shape.
        kept: of a merge in several calls: counts what is kept, for the caller to warn of at the
            end. If None, a `CartWarning` says so where the result is nearly the plain average,
            because nearly all of the differences is kept.
        turned: names of the tensors that are stored as (inputs, outputs), as in `merge_tensors`;
            `cart_plugin.inspect.turned_parameters` tells them of a model.

    Returns:
        The merged tensors, in the order of the first model. Integer tensors (buffers) are copied
        if all models agree on them.

    Raises:
        CartError: as `merge_tensors`, and for tensors that a model or the base lacks.
    """
    named = (
        dict(state_dicts)
        if isinstance(state_dicts, Mapping)
        else {str(i): state_dict for i, state_dict in enumerate(state_dicts)}
    )
    models = list(named)
    if not models:
        raise CartError("CART needs at least two fine-tuned models, got none")
    settings = settings or CartSettings()
    if not isinstance(settings, CartSettings):
        raise CartError(f"settings must be CartSettings(...), got {type(settings).__name__}")
    holders = dict(named)
    for who, held in (*holders.items(), ("the base model", base)):
        if held is not None and not hasattr(held, "keys"):
            raise CartError(
                f"{who} must be a state dict, a mapping from names to tensors, got "
                f"{type(held).__name__}; load files with safetensors.torch.load_file, and give "
                "the state_dict() of a module"
            )
    is_centre = settings.center == "base"
    if is_centre and base is not None:
        holders["the base model"] = base
    check_same_tensors(holders)
    check_whole_weights(named)
    base = base if settings.takes_base else None
    counted = Kept() if kept is None else kept
    merged = {}
    for name in named[models[0]]:
        tensors = [named[model][name] for model in models]
        for model, tensor in zip(models, tensors, strict=True):
            if not isinstance(tensor, Tensor):
                raise CartError(
                    f"{name} of {model} is a {type(tensor).__name__}, not a tensor; leave it out"
                )
        if not any(tensor.is_floating_point() for tensor in tensors):
            merged[name] = agreed_buffer(tensors, models, name)
            continue
        is_matrix = decompose(name, tensors[0].shape)
        start = None
        if base is not None and (is_matrix or is_centre):
            if name not in base:
                raise CartError(
                    f"the base model lacks {name}, which is decomposed; give the one that the "
                    "models were fine-tuned from, or none"
                )
            start = base[name]
        merged[name] = merge_tensors(
            tensors,
            settings,
            weights=weights,
            base=start,
            name=name,
            models=models,
            decompose=is_matrix,
            kept=counted,
            turned=name in turned,
        )
    if kept is None and (text := counted.warning()):
        warnings.warn(text, CartWarning, stacklevel=2)
    return merged
