"""Weights that a model stores as (inputs, outputs), and not as torch's linear layers do.

GPT-2's `Conv1D`, and the stacked experts of GPT-OSS and Llama 4. What stands for the inputs of a
task are the rows of the matrix that multiplies them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from torch import nn

from cart_plugin.checkpoints import names
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.errors import CartError
from cart_plugin.merging.tensors import matrix_shape

# What transformers calls its `Conv1D`s: without one and without a stack a model is not built.
_CONV1D = re.compile(r"(?:^|\.)(?:[cq]_attn|c_fc|c_proj)\.weight$")
# Classes of experts that (in some releases of transformers) do not say so by `is_transposed`.
_UNMARKED = ("Llama4TextExperts", "GptOssExperts")


def turned_parameters(model: nn.Module) -> set[str]:
    """The names of a model's parameters that are stored as (inputs, outputs)."""
    from transformers.pytorch_utils import Conv1D

    found = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, Conv1D):
            found.add(f"{prefix}weight")
        elif getattr(module, "is_transposed", False) or type(module).__name__ in _UNMARKED:
            own = module.named_parameters(recurse=False)
            found |= {prefix + name for name, parameter in own if parameter.ndim == 3}
    return found


def turned_weights(checkpoint: Checkpoint) -> set[str]:
    """The same of a checkpoint, by its own names.

    Raises:
        CartError: it may have such, but transformers cannot build its model.
    """
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    if not any(may_be_turned(name, shape) for name, shape in shapes.items()):
        return set()
    model = names.meta_model(checkpoint.path, checkpoint.config, checkpoint.name)
    stored = names.plain_sources(model, shapes)
    return {stored[name] for name in turned_parameters(model) if name in stored}


def may_be_turned(name: str, shape: Sequence[int]) -> bool:
    """Whether a weight may be stored as (inputs, outputs), by its name and shape."""
    if len(shape) == 3:
        return matrix_shape(name, shape)[1:] == tuple(shape[1:])  # a stack, and no kernel
    return len(shape) == 2 and bool(_CONV1D.search(name))


def is_one_of(name: str, kinds: Collection[str]) -> bool:
    """Whether a weight is of one of some kinds, with or without the model's own prefix.

    A merge may take layers from elsewhere, and call ``h.0`` what is ``transformer.h.0`` to others.

    Args:
        name: the weight's.
        kinds: names by `cart_plugin.checkpoints.names.of_any_layer`.
    """
    own = names.of_any_layer(name)
    return any(own == it or own.endswith(f".{it}") or it.endswith(f".{own}") for it in kinds)


def not_told(error: CartError) -> str:
    """What to say where `turned_weights` fails, and weights are taken as they are stored."""
    return (
        "weights are taken to be stored as (outputs, inputs), as torch's linear layers store them: "
        f"{error}"
    )
