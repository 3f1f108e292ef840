"""GPT-2's weights, which are stored with their inputs first."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("fusion_bench")

from transformers import GPT2Config, GPT2Model

from cart_plugin import CartSettings, merge_state_dicts
from cart_plugin.fusion_bench.adarank import CartGPT2AdaRankAlgorithm
from cart_plugin.fusion_bench.algorithm import CartAlgorithm
from cart_plugin.inspect import turned_parameters
from tests.fusion_bench import tiny
from tests.fusion_bench.test_cart import close, states


@pytest.mark.parametrize("with_base", [True, False])
def test_cart_auto_knows_where_gpt2_has_its_inputs(with_base: bool) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    held = {}
    for seed, name in enumerate(("a", "b", "c", "_pretrained_")):
        torch.manual_seed(0)
        held[name] = tiny.perturbed(GPT2Model(config), seed, 0.1)
    base = held["_pretrained_"].state_dict() if with_base else None
    if not with_base:
        del held["_pretrained_"]
    auto = CartSettings(lambda_="auto")
    expected = merge_state_dicts(states(held), auto, base=base, turned=turned_parameters(held["a"]))
    as_stored = merge_state_dicts(states(held), auto, base=base)
    merged = CartAlgorithm(scaling_factor="auto").run(held)
    assert close(merged, expected)
    assert not close(merged, as_stored)
    adapted = CartGPT2AdaRankAlgorithm(scaling_factor="auto", candidates=1.0, max_steps=0).run(held)
    assert close(adapted, expected)
