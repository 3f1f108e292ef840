"""Weights that a model stores as (inputs, outputs), and not as torch's linear layers do.

GPT-2's `Conv1D`, and the stacked experts of GPT-OSS and Llama 4. Merges take a matrix as it is
stored, but what stands for a model's inputs are the rows of the matrix that multiplies them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from cart_plugin.checkpoints import names
from cart_plugin.checkpoints.reading import Checkpoint
from cart_plugin.inspect.inputs import Heard, Inputs
from cart_plugin.inspect.merges import Differences
from cart_plugin.inspect.weights import Plain, Weight
from cart_plugin.linalg.factors import LowRank

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
    if not any(len(shape) == 3 or _CONV1D.search(name) for name, shape in shapes.items()):
        return set()
    model = names.meta_model(checkpoint.path, checkpoint.config, checkpoint.name)
    stored = names.plain_sources(model, shapes)
    return {stored[name] for name in turned_parameters(model) if name in stored}


def as_multiplied(weight: Weight | Plain) -> Weight | Plain:
    """A weight that is stored as (inputs, outputs), as (outputs, inputs); merges are the same."""
    if isinstance(weight, Plain):
        return weight

    def merges() -> Iterator[tuple[str, Tensor]]:
        for method, total in weight.merges():
            yield method, total.mT

    def answer(index: int, inputs: Inputs) -> Heard:
        heard = weight.answer(index, inputs)
        return heard._replace(turned=not heard.turned)

    from_base = None if weight.from_base is None else _turned(weight.from_base)
    return replace(
        weight,
        from_base=from_base,
        centred=_turned(weight.centred),
        merges=merges,
        answer=answer,
    )


def _turned(found: Differences) -> Differences:
    parts = [LowRank(part.Vh.mT, part.S, part.U.mT, part.error) for part in found.parts]
    return replace(found, parts=parts)
