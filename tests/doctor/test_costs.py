"""How much memory the merge of a tensor is said to take."""

from __future__ import annotations

import pytest
import torch
from mergekit.config import MergeConfiguration

from cart_plugin.checkpoints.headers import TensorInfo
from cart_plugin.doctor import costs
from cart_plugin.doctor.merges import Merge
from cart_plugin.doctor.planning import PlannedTensor

SIDE = 1024
COPY = 4 * SIDE**2  # bytes in fp32


def peak(method: str, inputs: int) -> float:
    models = [f"m{number}" for number in range(inputs)]
    config = MergeConfiguration.model_validate(
        {"merge_method": method, "models": [{"model": model} for model in models]}
    )
    sources = dict.fromkeys(models, ("x",))
    planned = PlannedTensor("x", None, False, sources, {}, {}, None)
    held = dict.fromkeys(models, TensorInfo((SIDE, SIDE), torch.float32))
    return costs.peak(Merge(planned, held, []), config)


@pytest.mark.parametrize(
    ("method", "inputs", "measured"),  # copies in fp32 beside the inputs, at 2048x2048
    [("linear", 8, 4), ("ties", 3, 9), ("ties", 8, 23.7), ("dare_ties", 8, 28.7), ("della", 3, 13)],
)
def test_mergekits_methods_take_no_more_than_is_said(
    method: str, inputs: int, measured: float
) -> None:
    assert (inputs + measured) * COPY <= peak(method, inputs) <= 4 * (inputs + 8) * COPY
