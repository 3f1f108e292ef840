"""Pools of models in several dtypes: results are the first model's numbers, or refused."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

pytest.importorskip("fusion_bench")

from fusion_bench import BaseModelPool

from cart_plugin import CartError
from cart_plugin.fusion_bench.adamerging import CartGPT2AdaMergingAlgorithm, PlainAdaMerging
from cart_plugin.fusion_bench.adarank import CartGPT2AdaRankAlgorithm
from cart_plugin.fusion_bench.algorithm import CartAlgorithm
from tests.fusion_bench.test_cart import models


class Plain(PlainAdaMerging):
    """Plain AdaMerging that adapts nothing."""

    prepare_inputs = batches = logits = None


def mixed(name: str) -> dict[str, nn.Module]:
    """A first model in fp16, and others in fp32 with a value that fp16 cannot hold."""
    held = {
        model: nn.Sequential(*one, nn.BatchNorm1d(5), nn.Embedding(7, 5))
        for model, one in models(3).items()
    }
    for model, one in held.items():
        one.state_dict()[name].view(-1)[0] = 6.5e4 if model == "task0" else 1e5
    held["task0"].half()
    return held


@pytest.mark.parametrize("name", ["2.weight", "0.bias", "4.running_var", "5.weight"])
@pytest.mark.parametrize(
    "run",
    [
        CartAlgorithm(rank=2),
        CartAlgorithm(rank=2, return_single_task_models=True),
        CartGPT2AdaMergingAlgorithm(rank=2, max_steps=0),
        CartGPT2AdaRankAlgorithm(rank=2, max_steps=0),
        CartGPT2AdaRankAlgorithm(rank=2, max_steps=0, exclude_keys=["5.weight"]),
        Plain(max_steps=0),
    ],
    ids=["cart", "single", "adamerging", "adarank", "adarank-dense", "plain"],
)
def test_no_infinities_are_written(run: Any, name: str) -> None:
    with pytest.raises(CartError, match=rf"tensor '{name}'.* leave the range of torch\.float16"):
        run.run(BaseModelPool(mixed(name)))
