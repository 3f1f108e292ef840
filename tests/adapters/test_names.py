"""Modules that adapters call differently are refused; other modules of like names are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cart_plugin.adapters import merge_adapters
from tests.adapters.lora import change_config, change_tensors, save_base, save_loras, tensors
from tests.adapters.refused import refuses


@pytest.mark.parametrize("now", ["", "model.language_model.", "language_model.model."])
def test_adapters_of_two_classes_of_a_base(now: str, own_trio: list[Path]) -> None:
    held = tensors(own_trio[1])
    start = "base_model.model."
    renamed = {name.replace(f"{start}model.", f"{start}{now}"): held[name] for name in held}
    save_file(renamed, own_trio[1] / "adapter_model.safetensors", {"format": "pt"})
    module = "layers.0.self_attn.q_proj"
    refuses(own_trio[:2], f"call one module differently ({now}{module} and model.{module})", "head")


def test_adapters_of_two_parts_of_a_base(own_trio: list[Path], tmp_path: Path) -> None:
    """Those of images have names like those of texts, on another way and of other widths."""
    held = tensors(own_trio[1])
    for way, width in (("model.vision_tower.", 24), ("visual.", 32)):
        renamed = {
            name.replace(".model.model.", f".model.{way}"): (
                tensor[:, :width] if "lora_A" in name else tensor
            ).contiguous()
            for name, tensor in held.items()
        }
        save_file(renamed, own_trio[1] / "adapter_model.safetensors", {"format": "pt"})
        report = merge_adapters(own_trio[:2], tmp_path / way)
        assert len(report.modules) == 8


def name_stacks(adapter: Path, *stacks: str) -> None:
    """Give an adapter its stack of layers under each of these names."""

    def change(held: dict[str, Tensor]) -> None:
        for name in list(held):
            tensor = held.pop(name)
            for stack in stacks:
                held[name.replace("model.model.layers", f"model.{stack}")] = tensor.clone()

    change_tensors(adapter, change)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("vision_tower.encoder.layers", "vision_tower.vision_model.encoder.layers"),
        ("model.language_model.layers", "language_model.model.layers"),
    ],
)
def test_one_of_two_towers_by_another_name(one: str, other: str, own_trio: list[Path]) -> None:
    """What else they share does not tell that all is called alike."""
    math, code, _ = own_trio
    name_stacks(math, "text.blocks", one)
    name_stacks(code, "text.blocks", other)
    found = [f"{way}.0.self_attn.q_proj" for way in (other, one)]
    refuses([math, code], f"call one module differently ({' and '.join(found)})")


@pytest.mark.parametrize(
    "stacks",
    [
        ("encoder.encoder.layer", "decoder.bert.encoder.layer"),
        ("model.encoder.layers", "model.decoder.layers"),
    ],
)
def test_an_encoders_and_a_decoders(
    stacks: tuple[str, str], own_trio: list[Path], tmp_path: Path
) -> None:
    for adapter, stack in zip(own_trio[:2], stacks, strict=True):
        name_stacks(adapter, stack)
    report = merge_adapters(own_trio[:2], tmp_path / "out")
    assert len(report.modules) == 8


def test_towers_that_both_know_are_called_alike(own_trio: list[Path], tmp_path: Path) -> None:
    """Each changes other modules of them, of the same widths, on the way to one and further."""
    stacks = ("model.layers", "model.vision.layers")
    for adapter, lacking in zip(own_trio[:2], stacks, strict=True):
        name_stacks(adapter, *stacks)

        def drop(held: dict[str, Tensor], lacking: str = f"model.{lacking}") -> None:
            for name in [name for name in held if lacking in name and "v_proj" in name]:
                del held[name]

        change_tensors(adapter, drop)
    report = merge_adapters(own_trio[:2], tmp_path / "out")
    assert len(report.modules) == 8


def test_experts_by_two_releases_of_transformers(tmp_path: Path) -> None:
    base = save_base(tmp_path, "mixtral")
    stacked = {"target_parameters": ["mlp.experts.gate_up_proj"]}
    adapters = save_loras(tmp_path, base, [stacked, {"target_modules": ["q_proj"]}])

    def name_as_before(held: dict[str, torch.Tensor]) -> None:
        expert = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1"
        held[f"{expert}.lora_A.weight"] = torch.ones(4, 8)
        held[f"{expert}.lora_B.weight"] = torch.ones(6, 4)

    change_tensors(adapters[1], name_as_before)
    change_config(adapters[1], target_modules=["q_proj", "w1"])
    refuses(adapters, "adapter code has experts one by one", "math has them stacked")
