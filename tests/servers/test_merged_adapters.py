"""Servers with an adapter that was merged answer as PEFT's model with it in its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest

from cart_plugin.adapters import merge_adapters
from tests.adapters.lora import save_lora
from tests.servers.servers import LIMIT, ask, divergence, logprobs, start

pytestmark = [pytest.mark.servers, pytest.mark.timeout(1200)]

_ATTENTION = ["q_proj", "k_proj", "v_proj"]
_ALL = [*_ATTENTION, "o_proj", "gate_proj", "up_proj", "down_proj"]
# Of several ranks, scales and modules: the merged adapter has one of each.
ADAPTERS: list[dict[str, Any]] = [
    {"r": 4, "target_modules": _ALL},
    {"r": 8, "target_modules": _ALL, "use_rslora": True},
    {"r": 6, "target_modules": _ATTENTION},
]
COMMON: dict[str, Any] = {"lora_alpha": 16, "task_type": "CAUSAL_LM"}
RANKS = {"default": None, "full": "full"}


@pytest.mark.parametrize("server", ["llama_cpp", "vllm"])
@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
)
def test_a_server_answers_as_peft_does(server: str, architecture: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    start(architecture).save_pretrained(base)
    adapters = [
        save_lora(tmp_path / f"adapter{seed}", base, seed, scale=0.03, **COMMON, **options)
        for seed, options in enumerate(ADAPTERS)
    ]
    merged = {}
    for name, rank in RANKS.items():
        merge_adapters(adapters, tmp_path / name, rank=rank)
        merged[name] = tmp_path / name
    found = ask(server, base, merged, tmp_path / server)
    assert divergence(logprobs(base), found[""]) <= LIMIT
    for name, folder in merged.items():
        whole = peft.PeftModel.from_pretrained(start(architecture), str(folder))
        whole.merge_and_unload().save_pretrained(tmp_path / f"{name}-whole")
        expected = logprobs(tmp_path / f"{name}-whole")
        assert divergence(expected, found[""]) > 1e-3, "the adapter changes nothing"
        assert divergence(expected, found[name]) <= LIMIT, name
