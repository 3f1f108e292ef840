"""Who loads a merged adapter, by its form. What servers do is tried in `tests/servers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cart_plugin.adapters import merge_adapters
from cart_plugin.adapters.report import Report
from tests.adapters.lora import change_config, change_tensors, save_base, save_loras

SERVERS = ("vLLM", "SGLang", "llama.cpp")


def merged(
    folder: Path, architecture: str = "llama", rank: int | None = None, **config: Any
) -> Report:
    base = save_base(folder, architecture, num_hidden_layers=1)
    adapters = save_loras(folder, base, [{}, {}], task_type="CAUSAL_LM", **config)
    return merge_adapters(adapters, folder / "out", rank=rank)


def by_name(report: Report) -> dict[str, bool | None]:
    assert report.loaders[0].name == "PEFT"
    assert report.loaders[0].loads
    return {loader.name: loader.loads for loader in report.loaders[1:]}


def test_of_linear_layers_all(tmp_path: Path) -> None:
    report = merged(tmp_path, rank=9)
    assert by_name(report) == dict.fromkeys(SERVERS, True)
    assert [loader.hint for loader in report.loaders] == [
        "",
        "--max-lora-rank 16",
        "--max-lora-rank 9",
        "",
    ]
    written = json.loads((tmp_path / "out" / "report.json").read_text())["loaded_by"]
    assert written["vLLM"] == {"loads": True, "with": "--max-lora-rank 16"}


@pytest.mark.parametrize(
    ("config", "refused", "reason"),
    [
        ({"target_modules": ["q_proj"]}, ("SGLang",), "misses those that belong to model.layers.0"),
        ({"target_modules": ["embed_tokens"]}, SERVERS, "takes linear layers only: model.embed_"),
        ({"target_modules": r".*\.(q|v)_proj"}, ("SGLang",), "no regular expression as target_mod"),
        ({"lora_bias": True}, SERVERS, "takes no biases: model.layers.0.self_attn.q_proj.lora_B"),
        ({"modules_to_save": ["lm_head"]}, SERVERS, "lm_head.weight"),
        ({"rank": 513}, ("vLLM",), "allows ranks up to 512, and here is one of 513"),
    ],
)
def test_of_others_not_all(
    config: dict[str, Any], refused: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    report = merged(tmp_path, **config)
    assert by_name(report) == {name: name not in refused for name in SERVERS}
    for loader in report.loaders[1:]:
        assert any(reason in why for why in loader.reasons) == (loader.name in refused)


def test_experts_and_conv1d(tmp_path: Path) -> None:
    report = merged(tmp_path, "qwen3-moe", target_parameters=["mlp.experts.down_proj"])
    assert by_name(report) == dict.fromkeys(SERVERS, False)
    assert "stacked experts" in report.loaders[1].reasons[0]
    for adapter in (tmp_path / "math", tmp_path / "code"):
        change_config(adapter, fan_in_fan_out=True, target_parameters=None)
        change_tensors(
            adapter, lambda held: [held.pop(name) for name in list(held) if "mlp" in name]
        )
    report = merge_adapters([tmp_path / "math", tmp_path / "code"], tmp_path / "turned")
    assert by_name(report) == dict.fromkeys(SERVERS, False)
    assert "takes linear layers only" in report.loaders[1].reasons[0]


def test_a_head_has_not_been_tried(tmp_path: Path) -> None:
    report = merged(tmp_path, target_modules=["q_proj", "v_proj", "lm_head"])
    assert by_name(report) == dict.fromkeys(SERVERS, False)  # PEFT saves the base's own, too
    adapters = [tmp_path / "math", tmp_path / "code"]
    for adapter in adapters:
        change_tensors(adapter, lambda held: held.pop("base_model.model.lm_head.base_layer.weight"))
    report = merge_adapters(adapters, tmp_path / "without")
    assert by_name(report) == dict.fromkeys(SERVERS, None)
    assert report.loaders[1].reasons == ("LoRA of lm_head has not been tried",)


@pytest.mark.parametrize(
    ("module", "server"), [("norm", "llama.cpp"), ("embed_tokens", "SGLang"), ("lm_head", "SGLang")]
)
def test_who_would_answer_wrongly_without_a_word(module: str, server: str, tmp_path: Path) -> None:
    report = merged(tmp_path, modules_to_save=[module])
    silent = {loader.name for loader in report.loaders if loader.silent}
    assert server in silent
    told = {name for name in SERVERS for note in report.notes if f"not to {name}:" in note}
    assert told == silent
