"""No matrix of a weight's size comes about, and few of the size of all factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from cart_plugin import CartSettings
from cart_plugin.adapters import merge_adapters
from cart_plugin.merging.span_measures import answers, overlaps
from cart_plugin.merging.spans import Difference, Span, merge_in_span, of_rank
from tests.adapters.lora import tensors
from tests.support import random


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation of torch makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return found


@pytest.mark.parametrize("method", ["auto", "cart"])
@pytest.mark.parametrize("count", [3, 6])
def test_of_the_largest_tensor(method: str, count: int) -> None:
    m, n, rank = 3000, 5000, 4
    parts = [
        Difference(random(1, m, rank, seed=seed), random(1, rank, n, seed=9 + seed))
        for seed in range(count)
    ]
    settings = CartSettings(lambda_="auto" if method == "auto" else 1.0)
    with Largest() as largest:
        span = Span(parts)
        found = merge_in_span(span, [1 / count] * count, settings)
        cut = of_rank(found, rank)
        span.lifted(cut)
        answers(span.parts, found.total)
        overlaps(span.parts)
    assert largest.elements == max(m, n) * count * rank  # all factors of one side


def test_a_weight_of_which_no_machine_holds_a_matrix(tmp_path: Path) -> None:
    side, module = 400_000, "base_model.model.layers.0.up_proj"  # 640 GB in fp32
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        held = {
            f"{module}.lora_A.weight": random(2, side, seed=seed, dtype=torch.bfloat16),
            f"{module}.lora_B.weight": random(side, 2, seed=9 + seed, dtype=torch.bfloat16),
        }
        save_file(held, folder / "adapter_model.safetensors", {"format": "pt"})
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    merge_adapters([tmp_path / str(seed) for seed in range(3)], tmp_path / "out")
    shapes = {tuple(tensor.shape) for tensor in tensors(tmp_path / "out").values()}
    assert shapes == {(2, side), (side, 2)}
