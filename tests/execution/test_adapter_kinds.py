"""Adapters that are no LoRA of modules: PEFT knows what they do to the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from click.testing import Result

from tests.doctor.tiny import write_recipe
from tests.execution.test_command import refuses

Merge = Callable[..., Result]
Saved = Callable[..., list[str]]

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def load(folder: str | Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def save_adapter(folder: Path, base: str, seed: int, config: peft.PeftConfig) -> Path:
    torch.manual_seed(seed)
    model = peft.get_peft_model(load(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=[])),
        ("llama", peft.LoHaConfig(r=2, target_modules=["k_proj", "v_proj"])),
        ("llama", peft.VeraConfig(r=2, target_modules=["q_proj", "o_proj"])),
        (
            "qwen3-moe",
            peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS),
        ),
    ],
)
def test_an_adapter_that_changes_weights_is_merged(
    architecture: str, config: peft.PeftConfig, merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    base = saved(architecture)[0]
    adapters = [save_adapter(tmp_path / f"a{seed}", base, seed, config) for seed in range(3)]
    recipe = write_recipe(
        tmp_path / "r.yaml",
        [f"{base}+{adapter}" for adapter in adapters],
        merge_method="linear",
        parameters={"weight": 1.0},
    )
    done = merge(recipe, tmp_path / "out")
    assert done.exit_code == 0, done.output
    fused = [
        peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict()
        for adapter in adapters
    ]
    own, changed = load(base).state_dict(), 0
    for name, tensor in load(tmp_path / "out").state_dict().items():
        mean = torch.stack([state[name] for state in fused]).mean(0)
        assert torch.allclose(tensor, mean, atol=1e-6), name
        changed += not torch.equal(tensor, own[name])
    assert changed >= 4


def test_a_prompt_is_no_change_of_the_weights(merge: Merge, saved: Saved, tmp_path: Path) -> None:
    base = saved("llama")[0]
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    adapter = save_adapter(tmp_path / "prompt", base, 0, config)
    recipe = write_recipe(tmp_path / "r.yaml", [*saved("llama")[1:], f"{base}+{adapter}"])
    refuses(merge(recipe, tmp_path / "out"), "is a PROMPT_TUNING", "before the input")
