"""Which of a checkpoint's integers are weights, where its class is known and where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cart_plugin.checkpoints.headers import TensorInfo
from cart_plugin.checkpoints.placement import quantised
from cart_plugin.checkpoints.reading import Checkpoint

INT8 = TensorInfo((4, 4), torch.int8)


@pytest.mark.parametrize(
    ("name", "info", "is_weight"),
    [
        ("a.q_proj.weight", INT8, True),
        ("a.q_proj.qweight", TensorInfo((4, 4), torch.int32), True),
        ("a.q_proj.weight_packed", TensorInfo((4, 4), None, "F4"), True),
        ("norm.weight", TensorInfo((4,), torch.float8_e4m3fn), True),
        ("attn.bias", TensorInfo((1, 1, 4, 4), torch.uint8), False),
        ("attn.mask", TensorInfo((4, 4), torch.bool), False),
        ("a.relative_position_index", TensorInfo((4, 4), torch.int64), False),
        ("embeddings.position_ids", TensorInfo((1, 4), torch.int64), False),
        ("bn.num_batches_tracked", TensorInfo((), torch.int64), False),
    ],
)
def test_without_a_class_names_decide(name: str, info: TensorInfo, is_weight: bool) -> None:
    checkpoint = Checkpoint("it", Path("nowhere"), tensors={name: info})
    assert quantised(checkpoint) == ([name] if is_weight else [])
