"""What can be merged: checks of the models' tensors, with errors that name model and tensor."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from cart_plugin.errors import CartError
from cart_plugin.wording import count, some

# How PEFT's names of adapters' parameters begin.
_OF_ADAPTERS = (
    *("lora_", "randlora_", "vera_lambda_", "vblora_", "ia3_", "hada_", "lokr_", "oft_", "boft_"),
    *("fourierft_", "c3a_", "hra_", "bone_", "road_", "shira_"),
)


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype to which all promote."""
    return functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])


def normalised(weights: Sequence[float] | None, count: int, where: str) -> list[float]:
    """Weights that sum to 1; equal ones for None."""
    if weights is None:
        return [1 / count] * count
    if isinstance(weights, Mapping):
        raise CartError(f"{where}: weights are a list in the order of the models, not a mapping")
    if len(weights) != count:
        raise CartError(f"{where}: {count} models but {len(weights)} weights")
    if any(weight is None or isinstance(weight, str) for weight in weights):
        raise CartError(f"{where}: weights must be numbers, got {list(weights)}")
    total = sum(weights)
    if not math.isfinite(total):
        raise CartError(f"{where}: weights must be finite numbers, got {list(weights)}")
    if total <= 0:
        raise CartError(f"{where}: weights must sum to more than 0, got {list(weights)}")
    return [weight / total for weight in weights]


def check_inputs(
    tensors: Sequence[Tensor], models: Sequence[str] | None, name: str | None
) -> tuple[list[str], str]:
    """Refuse fewer than two tensors, unequal shapes, and dtypes that cannot be averaged.

    Returns:
        What errors call the models (their numbers if None) and the tensor.
    """
    models = list(models) if models is not None else [str(i) for i in range(len(tensors))]
    where = f"tensor {name!r}" if name is not None else "tensor"
    if len(tensors) < 2:
        raise CartError(
            f"CART needs at least two fine-tuned models; "
            f"{where} comes from {len(tensors)}: {', '.join(models) or 'none'}"
        )
    check_kind(zip(models, tensors, strict=True), tensors[0].shape, models[0], where)
    return models, where


def check_centre(
    base: Tensor | None, center: Literal["average", "base"] | None, where: str
) -> None:
    """Refuse to take differences from a base that is not there."""
    if center == "base" and base is None:
        raise CartError(
            f"{where}: center is 'base', but there is no base model, or it lacks this tensor; give "
            "one that has it"
        )


def check_kind(
    named: Iterable[tuple[str, Tensor]], shape: torch.Size, first: str, where: str
) -> None:
    """Refuse tensors that cannot be averaged, or have another shape than the first model's."""
    for model, tensor in named:
        # Eight-bit floats come with scales of their own, which an average would leave out.
        if not tensor.is_floating_point() or tensor.element_size() == 1:
            raise CartError(
                f"{where} of {model} is {tensor.dtype}; quantised or integer weights cannot be "
                "averaged, convert them to a floating-point checkpoint first"
            )
        if tensor.is_meta:
            raise CartError(f"{where} of {model} is on the meta device: its values are not loaded")
        if tensor.shape != shape:
            raise CartError(
                f"{where} is {tuple(shape)} in {first} but {tuple(tensor.shape)} in {model}; "
                "merged models must have the same architecture (leave heads of different sizes "
                "out, and align vocabularies)"
            )


def check_finite(
    total: Tensor, models: Sequence[str], tensors: Sequence[Tensor], where: str
) -> None:
    """Name the model whose tensor makes ``total``, a sum of them all, infinite or NaN."""
    # A sum is not finite if any term is not: one cheap reduction covers all models.
    if bool(torch.isfinite(total.sum())):
        return
    for model, tensor in zip(models, tensors, strict=True):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            reason = "the checkpoint is broken, or was trained in too narrow a dtype"
            if tensor.dtype == torch.float16 and not bool(tensor.isnan().any()):
                # mergekit casts to a recipe's dtype before anybody sees the values.
                reason = (
                    "values beyond 65504 do not fit float16: if the checkpoint is stored in "
                    "another dtype, merge in bfloat16 or float32 (a recipe's dtype); else it is "
                    "broken"
                )
            raise CartError(
                f"{where} of {model} holds {bad} NaN or infinite values out of {tensor.numel()}; "
                f"{reason}"
            )


def check_range(merged: Tensor, where: str, remedy: str = "") -> None:
    """Refuse merged values that their dtype cannot hold.

    Args:
        merged: in the dtype in which it is kept.
        where: what it is called.
        remedy: what to do besides taking a wider dtype.

    Raises:
        CartError: some are NaN or infinite.
    """
    # The sum alone is cheaper, but may overflow where no value does.
    total = merged.sum(dtype=torch.promote_types(merged.dtype, torch.float32))
    if not bool(torch.isfinite(total) or torch.isfinite(merged).all()):
        raise CartError(
            f"{where}: the merged values leave the range of {merged.dtype}; use a wider dtype "
            f"(float32 or bfloat16){remedy}"
        )


def check_same_tensors(holders: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse models of which one lacks a tensor that another has."""
    held = {model: set(state_dict) for model, state_dict in holders.items()}
    union = set().union(*held.values())
    for model, names in held.items():
        missing = sorted(union - names)
        if missing:
            raise CartError(
                f"{model} lacks {count(len(missing), 'tensor')} that other models have: "
                f"{some(missing)}; merged models must have the same architecture (leave task heads "
                "out)"
            )


def check_whole_weights(holders: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse models with adapters beside their weights, if they are not the same in all.

    Args:
        holders: state dicts of the same tensors, by model.

    Raises:
        CartError: parameters of adapters differ between two models.
    """
    first, *others = holders.values()
    for name in first:
        if not any(part.startswith(_OF_ADAPTERS) for part in name.split(".")):
            continue
        if not all(torch.equal(first[name], other[name].to(first[name])) for other in others):
            raise CartError(
                f"the models hold adapters beside their weights ({name}), and factors of adapters "
                "cannot be merged one by one: merge the adapters into the weights first (PEFT's "
                "merge_and_unload), or merge adapter folders with mergekit-cart merge-adapters"
            )


def agreed_buffer(tensors: Sequence[Tensor], models: Sequence[str], name: str) -> Tensor:
    """The one value of an integer tensor; of counters the largest."""
    if all(tensor.ndim == 0 for tensor in tensors):
        # Counters, such as the batches that BatchNorm has seen: the longest training's.
        return max(tensors, key=lambda tensor: tensor.item()).clone()
    for model, tensor in zip(models, tensors, strict=True):
        if tensor.shape != tensors[0].shape or not torch.equal(tensor, tensors[0]):
            raise CartError(
                f"tensor {name!r} holds integers that differ between {models[0]} and {model}; "
                "only buffers on which all models agree can be kept: leave it out, or make it equal"
            )
    return tensors[0].clone()


# Buffers that old versions of transformers saved, with -1e9 or so: infinite in float16.
_MASK = re.compile(r"\.(?:attn|attention)\.(?:masked_)?bias$")


def is_agreed_mask(name: str, tensors: Sequence[Tensor]) -> bool:
    """Whether a tensor's infinities are meant: a causal mask on which all models agree."""
    if not tensors or tensors[0].ndim == 1 or not _MASK.search(name):
        return False
    return bool(tensors[0].isinf().any()) and all(torch.equal(tensors[0], own) for own in tensors)
