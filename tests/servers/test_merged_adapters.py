"""Servers with an adapter that was merged answer as PEFT's model with it in its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

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


ARCHITECTURES = ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]


def merge(architecture: str, folder: Path) -> dict[str, Path]:
    """Adapters of a tiny model (``base``), merged to the ranks."""
    base = folder / "base"
    start(architecture).save_pretrained(base)
    adapters = [
        save_lora(folder / f"adapter{seed}", base, seed, scale=0.03, **COMMON, **options)
        for seed, options in enumerate(ADAPTERS)
    ]
    for name, rank in RANKS.items():
        merge_adapters(adapters, folder / name, rank=rank)
    return {name: folder / name for name in RANKS}


def whole(architecture: str, adapter: Path) -> Any:
    """The model with an adapter in its weights, by PEFT."""
    return peft.PeftModel.from_pretrained(start(architecture), str(adapter)).merge_and_unload()


@pytest.mark.parametrize("server", ["llama_cpp", "vllm"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_server_answers_as_peft_does(server: str, architecture: str, tmp_path: Path) -> None:
    merged = merge(architecture, tmp_path)
    found = ask(server, tmp_path / "base", merged, tmp_path / server)
    assert divergence(logprobs(tmp_path / "base"), found[""]) <= LIMIT
    for name, folder in merged.items():
        whole(architecture, folder).save_pretrained(tmp_path / f"{name}-whole")
        expected = logprobs(tmp_path / f"{name}-whole")
        assert divergence(expected, found[""]) > 1e-3, "the adapter changes nothing"
        assert divergence(expected, found[name]) <= LIMIT, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sglang_adds_what_peft_does(architecture: str, tmp_path: Path) -> None:
    merged = merge(architecture, tmp_path)
    found = ask("sglang", tmp_path / "base", merged, tmp_path / "sglang")
    base = start(architecture).state_dict()
    for name, folder in merged.items():
        assert "error" not in found[name], found[name]
        differences = load_file(found[name]["differences"])
        full = whole(architecture, folder).state_dict()
        assert differences.keys() == {key for key in base if not torch.equal(full[key], base[key])}
        for key, difference in differences.items():
            assert difference.abs().max() > 1e-3
            torch.testing.assert_close(base[key] + difference, full[key], atol=1e-6, rtol=1e-6)
