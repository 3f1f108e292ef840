"""What a merge method makes of a tensor, learnt from a tiny one.

Methods of mergekit differ in the dtype of what they give, some by the shape, and none says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.common import dtype_from_name

from cart_plugin.checkpoints.headers import TensorInfo
from cart_plugin.mergekit import CartMerge

_SIDE = 2


def result_dtype(merge: Any, inputs: Mapping[str, TensorInfo]) -> torch.dtype | None:
    """The dtype of a merged tensor; None if mergekit leaves it out, as some inputs lack it.

    Args:
        merge: mergekit's task, an `ExecuteMergeMethodTask`.
        inputs: what it gets, by the labels of the models that have the tensor.
    """
    usual = reduce(torch.promote_types, (info.dtype for info in inputs.values() if info.dtype))
    if isinstance(merge_methods.get(merge.method_name), CartMerge):
        return dtype_from_name(merge.out_dtype) or usual  # which counts the tensors that it merges
    models = {str(model): model for model in merge.model_order}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tensors = {models[label]: _tiny(info) for label, info in inputs.items()}
        try:
            made: torch.Tensor | None = merge.execute(tensors)
        except Exception:  # whatever a method makes of so few numbers
            return dtype_from_name(merge.out_dtype) or usual
    return None if made is None else made.dtype


def _tiny(info: TensorInfo) -> torch.Tensor:
    """A tensor of as many dimensions; integers are zeros, in which models have to agree."""
    shape = [min(size, _SIDE) for size in info.shape]
    return torch.rand(shape).to(info.dtype)
