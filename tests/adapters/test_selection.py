"""Which modules PEFT wraps for the merge: those of the adapters, by whatever selects these."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from cart_plugin.adapters import merge_adapters, merge_loaded
from tests.adapters.lora import (
    change_config,
    change_tensors,
    config_of,
    farthest,
    load,
    save_base,
    save_loras,
    state,
    tensors,
)
from tests.doctor.tiny import LLAVA

LLAVA_CLASS = transformers.LlavaForConditionalGeneration
NOTE = "so that the merge lists full names"


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    LLAVA_CLASS(LLAVA_CLASS.config_class(**LLAVA)).save_pretrained(folder)
    return folder


def name_as_before(adapter: Path) -> None:
    """As transformers before 5 called the tower; PEFT renames it as it loads the tensors."""

    def change(held: dict[str, torch.Tensor]) -> None:
        for name in [name for name in held if "vision_tower.encoder" in name]:
            held[name.replace("tower.encoder", "tower.vision_model.encoder")] = held.pop(name)
        assert any("tower.vision_model" in name for name in held)

    change_tensors(adapter, change)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([["q_proj", "v_proj"], ["q_proj", "up_proj"]], ["q_proj", "up_proj", "v_proj"]),
        ([r".*\.(q_proj|v_proj)"] * 2, r".*\.(q_proj|v_proj)"),
        ([r".*\.q_proj"], r".*\.q_proj"),
    ],
)
def test_old_names_of_a_tower_are_found(
    targets: list[Any], expected: Any, llava: Path, tmp_path: Path
) -> None:
    configs = [{"target_modules": own} for own in targets]
    adapters = save_loras(tmp_path, llava, configs, kind=LLAVA_CLASS)
    for adapter in adapters:
        name_as_before(adapter)
    report = merge_adapters(adapters, tmp_path / "out", method="linear", rank="full")
    assert not any(NOTE in note for note in report.notes)
    assert config_of(tmp_path / "out")["target_modules"] == expected
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(load(llava, LLAVA_CLASS), str(tmp_path / "out"))
    assert not [str(one.message) for one in caught if "adapter keys" in str(one.message)]
    start, found = (state(llava, one, LLAVA_CLASS) for one in (None, tmp_path / "out"))
    alone = [state(llava, adapter, LLAVA_CLASS) for adapter in adapters]
    mean = {name: sum(one[name] for one in alone) / len(alone) for name in found}
    assert farthest(found, mean) < 1e-6
    towers = [name for name in mean if "vision_tower" in name]
    assert max(float((mean[name] - start[name]).abs().max()) for name in towers) > 1e-2


def test_lists_become_one_list(base: Path, trio: list[Path], tmp_path: Path) -> None:
    merge_adapters(trio, tmp_path / "same")
    assert config_of(tmp_path / "same")["target_modules"] == ["q_proj", "v_proj"]
    adapters = save_loras(tmp_path, base, [{}, {"target_modules": ["q_proj", "down_proj"]}])
    merge_adapters(adapters, tmp_path / "other")
    assert config_of(tmp_path / "other")["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    for adapter in adapters:
        change_config(adapter, exclude_modules=["k_proj"])
    merge_adapters(adapters, tmp_path / "excluded")
    written = config_of(tmp_path / "excluded")
    assert written["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert written["exclude_modules"] == ["k_proj"]


@pytest.mark.parametrize("layers", [0, [1], [0, 1]])
def test_layers_of_all_adapters_stay_theirs(layers: Any, base: Path, tmp_path: Path) -> None:
    configs = [{}, {"target_modules": ["q_proj"]}]
    adapters = save_loras(tmp_path, base, configs, layers_to_transform=layers)
    merge_adapters(adapters, tmp_path / "out")
    assert config_of(tmp_path / "out")["layers_to_transform"] == layers
    model = peft.PeftModel.from_pretrained(load(base), str(tmp_path / "out"))
    held = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(held) == len(tensors(tmp_path / "out")) == 4 * len(layers if layers else [0])


@pytest.mark.parametrize(
    "others",
    [
        {"layers_to_transform": [1]},
        {"target_modules": r".*\.layers\.1\..*\.(q|v)_proj"},
        {"exclude_modules": r".*\.layers\.0\..*"},
    ],
)
def test_what_no_one_config_selects_has_full_names(
    others: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    adapters = save_loras(tmp_path, base, [{"target_modules": ["q_proj"]}, others])
    report = merge_adapters(adapters, tmp_path / "out")
    modules = ["model.layers.0.self_attn.q", "model.layers.1.self_attn.q"]
    expected = sorted(f"{module}_proj" for module in [*modules, "model.layers.1.self_attn.v"])
    assert config_of(tmp_path / "out")["target_modules"] == expected
    assert sum(NOTE in note for note in report.notes) == 1
    model = peft.PeftModel.from_pretrained(load(base), str(adapters[0]), "math")
    model.load_adapter(str(adapters[1]), "code")
    loaded = merge_loaded(model, ["math", "code"], "both")
    assert not any(NOTE in note for note in loaded.notes)  # they are the model's own


def test_an_empty_list_stays_one(tmp_path: Path) -> None:
    """None would mean PEFT's usual modules of the architecture."""
    base = save_base(tmp_path, "qwen3-moe", num_hidden_layers=1)
    common = {"target_parameters": ["mlp.experts.down_proj"], "target_modules": []}
    adapters = save_loras(tmp_path, base, [{}, {}], **common)
    merge_adapters(adapters, tmp_path / "out", rank="full", method="linear")
    assert config_of(tmp_path / "out")["target_modules"] == []
    alone = [state(base, adapter) for adapter in adapters]
    mean = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}
    assert farthest(state(base, tmp_path / "out"), mean) < 1e-6
