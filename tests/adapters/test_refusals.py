"""What cannot be merged: one line that names it and says what to do, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from cart_plugin import CartError
from cart_plugin.adapters import merge_adapters
from tests.adapters.lora import (
    change_config,
    change_tensors,
    farthest,
    save_base,
    save_lora,
    save_loras,
    state,
)
from tests.adapters.refused import refuses

FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FIRST_B = FIRST.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"use_dora": True}, ("DoRA", "merge_and_unload", "mergekit-cart merge")),
        ({"peft_type": "LOHA"}, ("is no LoRA but LOHA", "merge_and_unload")),
        ({"peft_type": "ADALORA"}, ("is no LoRA but ADALORA",)),
        ({"alora_invocation_tokens": [1, 2]}, ("activated LoRA", "used by itself only")),
        ({"layer_replication": [[0, 2], [1, 2]]}, ("layers are repeated", "by itself only")),
        ({"trainable_token_indices": [3]}, ("single rows of the embedding",)),
        ({"use_qalora": True}, ("QA-LoRA", "by itself only")),
        ({"ensure_weight_tying": True}, ("ties its factors",)),
        ({"use_bdlora": {"nblocks": 2}}, ("not known here", "use_bdlora")),
        ({"init_lora_weights": "pissa_niter_4"}, ("pissa_niter_4", "initial_model_for_weight")),
        ({"init_lora_weights": "olora"}, ("olora", "takes a part away")),
        ({"init_lora_weights": "loftq"}, ("loftq",)),
        ({"r": 8}, ("has rank 4 in its weights and 8 in", "layers.0.self_attn.q_proj")),
        ({"rank_pattern": {"v_proj": 2}}, ("v_proj has rank 4 in its weights and 2",)),
        ({"lora_alpha": "x"}, ("'x' as the number for", "alpha_pattern")),
        ({"r": None}, ("None as the number for",)),
        ({"rank_pattern": [1]}, ("rank_pattern", "no mapping")),
        ({"alpha_pattern": {"(": 2}}, ("alpha_pattern", "'(', which is no regular expression")),
        ({"base_model_name_or_path": "org/other"}, ("different bases", "org/other", "--base")),
        ({"revision": "v2"}, ("differ in revision", "v2 and v1", "--base")),
        ({"revision": None}, ("differ in revision", "main and v1", "--base")),
        ({"bias": "all"}, ("differ in bias", "all and none", "merge each into its base")),
        ({"task_type": "SEQ_CLS"}, ("differ in task_type", "SEQ_CLS and CAUSAL_LM")),
        (
            {"target_parameters": ["mlp.gate.weight"]},
            ("differ in target_parameters", "merge each into its base"),
        ),
    ],
)
def test_configs(changes: dict[str, Any], parts: tuple[str, ...], own_trio: list[Path]) -> None:
    for adapter in own_trio:
        change_config(adapter, task_type="CAUSAL_LM", revision="v1")
        if "target_parameters" in changes:
            change_config(adapter, target_parameters=["mlp.experts.weight"])
    change_config(own_trio[1], **changes)
    refuses(own_trio, "code", *parts)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda held: held[FIRST].fill_(torch.nan), (FIRST, "128 NaN or infinite")),
        (lambda held: held[FIRST_B][0].fill_(torch.inf), (FIRST_B, "4 NaN or infinite")),
        (lambda held: held.pop(FIRST), (FIRST_B, "one factor without its other")),
        (
            lambda held: held.update({FIRST.replace("lora_A.weight", "lora_magnitude_vector"): 0}),
            ("lora_magnitude_vector", "no part of a plain LoRA"),
        ),
        (lambda held: held.update({FIRST: held[FIRST][:3]}), ("do not fit each other", "(3, 32)")),
        (lambda held: held.update({FIRST: held[FIRST][:0]}), ("is empty (0, 32)", "DeepSpeed")),
        (
            lambda held: held.update({FIRST: held[FIRST][:, :16]}),
            ("different models", "linear 32 x 32", "linear 32 x 16", "q_proj"),
        ),
        (
            lambda held: held.update({FIRST: held[FIRST].to(torch.int8)}),
            (FIRST, "I8", "quantised"),
        ),
        (
            lambda held: [held.pop(name) for name in list(held)] and held.update(x=torch.ones(2)),
            ("holds no LoRA factors",),
        ),
        (
            lambda held: [held.update({name[11:]: held.pop(name)}) for name in list(held)],
            ("PEFT does not load model.model.layers", "start with base_model.model."),
        ),
        (
            lambda held: held.update({"base_model.model.model.norm.weight": torch.ones(32)}),
            ("holds base_model.model.model.norm.weight whole", "does not", "merge_and_unload"),
        ),
    ],
)
def test_tensors(
    change: Callable[[dict[str, Tensor]], object], parts: tuple[str, ...], own_trio: list[Path]
) -> None:
    def changed(held: dict[str, Any]) -> None:
        change(held)
        for name, value in held.items():
            held[name] = torch.ones(32) if isinstance(value, int) else value.contiguous()

    change_tensors(own_trio[1], changed)
    refuses(own_trio, "code", *parts)


@pytest.mark.parametrize("side", ["lora_B", "lora_A"])
def test_an_adapter_that_was_never_trained(side: str, own_trio: list[Path]) -> None:
    def zeroed(held: dict[str, Tensor]) -> None:
        for name in held:
            if side in name:
                held[name].zero_()

    change_tensors(own_trio[2], zeroed)
    refuses(own_trio, "adapter german changes nothing", "leave it out")


def test_zeros_in_some_modules_are_no_reason(own_trio: list[Path], tmp_path: Path) -> None:
    change_tensors(own_trio[2], lambda held: held[FIRST_B].zero_())
    merge_adapters(own_trio, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_other_shapes_of_what_is_held_whole(tmp_path: Path) -> None:
    base = save_base(tmp_path, num_hidden_layers=2)
    adapters = save_loras(tmp_path, base, [{}, {}], modules_to_save=["lm_head"])
    name = "base_model.model.lm_head.weight"
    change_tensors(adapters[1], lambda held: held.update({name: torch.ones(70, 32)}))
    refuses(adapters, name, "(70, 32)", "(64, 32)", "vocabularies of different sizes")


def test_other_integers_of_what_is_held_whole(own_trio: list[Path]) -> None:
    name = "base_model.model.model.position_ids"
    for start, adapter in zip((1, 0, 0), own_trio, strict=True):
        positions = torch.arange(start, start + 5)
        change_tensors(adapter, lambda held, values=positions: held.update({name: values}))
    refuses(own_trio, name, "holds integers that differ between code and math")


def test_eight_bit_floats_of_what_is_held_whole(own_trio: list[Path]) -> None:
    name = "base_model.model.model.norm.weight"
    change_tensors(
        own_trio[0], lambda held: held.update({name: torch.ones(32).to(torch.float8_e4m3fn)})
    )
    refuses(own_trio, name, "F8_E4M3; such values cannot be merged")


def test_a_convolution_of_several_groups(tmp_path: Path) -> None:
    sizes = {"hidden_sizes": [8, 12, 16, 16], "depths": [1, 1, 1, 1], "num_labels": 3}
    base, kind = tmp_path / "base", transformers.AutoModelForImageClassification
    transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(**sizes)
    ).save_pretrained(base)
    target = {"target_modules": r".*stages\.0.*dwconv", "kind": kind}
    adapter = save_lora(tmp_path / "a", base, 0, r=16, **target)
    refuses([adapter], "dwconv is a convolution of 8 groups", "merge_and_unload")


def test_patterns_of_stacked_experts(tmp_path: Path) -> None:
    base = save_base(tmp_path, "qwen3-moe")
    adapter = save_lora(tmp_path / "a", base, 0, r=2, target_parameters=["mlp.experts.down_proj"])
    change_config(adapter, alpha_pattern={"mlp.experts.down_proj": 3})
    refuses([adapter], "alpha_pattern names mlp.experts.down_proj")


def test_parameters_of_no_named_module(tmp_path: Path) -> None:
    """PEFT takes `down_proj` for that of any module; its LoRA has the name of the module alone."""
    base = save_base(tmp_path, "qwen3-moe")
    adapter = save_lora(tmp_path / "a", base, 0, target_parameters=["down_proj"])
    refuses([adapter], "has 'down_proj', and not of which module", "mlp.experts.down_proj")
    change_config(adapter, target_parameters=["mlp.experts.down_proj"])
    merge_adapters([adapter], tmp_path / "out", rank="full")
    assert farthest(state(base, tmp_path / "out"), state(base, adapter)) < 1e-6


@pytest.mark.parametrize(
    ("architecture", "config", "part"),
    [
        ("qwen3-moe", {"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters (model"),
        ("llama", {"target_modules": ["embed_tokens"]}, "LoRA of embeddings (model.embed_tokens)"),
    ],
)
def test_biases_beside_what_has_none(
    architecture: str, config: dict[str, Any], part: str, tmp_path: Path
) -> None:
    base = save_base(tmp_path, architecture)
    adapters = save_loras(tmp_path, base, [config, {"lora_bias": True}])
    refuses(adapters, "some adapters have biases (lora_bias)", part, "no adapter with both")


@pytest.mark.parametrize("other", [["v_proj"], ["q_proj", "v_proj"]])
def test_trained_biases_of_other_modules(other: list[str], tmp_path: Path) -> None:
    """What an adapter does not hold is the base's, and not nothing."""
    base = save_base(tmp_path, "qwen2", num_hidden_layers=1)
    configs = [{"target_modules": ["q_proj"]}, {"target_modules": other}]
    adapters = save_loras(tmp_path, base, configs, bias="lora_only")
    refuses(adapters, "_proj.base_layer.bias whole", "merge_and_unload")


def test_adapters_that_compress_has_made_around_other_bases(own_trio: list[Path]) -> None:
    """Their configs may name one path, in which each found another base."""
    for adapter, digest in zip(own_trio, ("1", "1", "2"), strict=True):
        (adapter / "base.json").write_text(json.dumps({"digest": digest}))
    out = own_trio[0].parent / "out"
    merge_adapters(own_trio[:2], out)
    assert json.loads((out / "base.json").read_text()) == {"digest": "1"}
    shutil.rmtree(out)
    refuses(own_trio, "around different bases", "math", "german", "compress all models at once")


def test_files(own_trio: list[Path], base: Path) -> None:
    math, code, german = own_trio
    refuses([math, base], "is a whole model and no adapter", "mergekit-cart merge", out=math / "o")
    refuses([math, code], "base must be the name or folder of a model, got ' '", base=" ")
    refuses([math.parent], f"is no adapter, but holds some; name {code}", out=math / "o")
    recipe = math.parent / "recipe.yaml"
    recipe.write_text(f"adapters: [{math}, {code}]")
    refuses([recipe, german], "is a recipe, which lists all adapters; name it alone")
    refuses([math, math.parent / "no-such"], "no folder here, nor in the hub's cache")
    refuses([math, code / "adapter_config.json"], "is a file")
    refuses([math, math.parent / "code" / ".." / "math"], "are one folder", "count twice")
    (code / "adapter_model.safetensors").unlink()
    refuses([math, code], "adapter code", "adapter_model.safetensors is missing")
    (code / "adapter_model.bin").touch()
    refuses([math, code], "adapter code", ".bin files", "save_pretrained")
    (german / "adapter_config.json").write_text("{")
    refuses([math, german], "adapter german", "adapter_config.json cannot be read")
    (german / "adapter_config.json").unlink()
    refuses([math, german], "adapter german has no adapter_config.json")
    shutil.rmtree(german)
    refuses([], "at least one adapter", out=math.parent / "out")


def test_weights_in_several_files(own_trio: list[Path]) -> None:
    file = own_trio[1] / "adapter_model.safetensors"
    file.rename(file.with_name("adapter_model-00001-of-00002.safetensors"))
    refuses(own_trio, "adapter code has its weights in several files", "PEFT does not load either")


def test_different_parameters_of_one_module(tmp_path: Path) -> None:
    """Their shapes differ, too, but not because the models do."""
    base = save_base(tmp_path, "qwen3-moe")
    configs = [
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"target_parameters": ["mlp.experts.down_proj"]},
    ]
    adapters = save_loras(tmp_path, base, configs)
    refuses(adapters, "differ in target_parameters", "merge each into its base")


def test_a_truncated_file(own_trio: list[Path]) -> None:
    file = own_trio[1] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuses(own_trio, "adapter code", "not a whole safetensors file")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"method": "ties"}, "method must be one of auto, cart, linear, got 'ties'"),
        ({"rank": 0}, "rank must be a positive whole number or 'full', got 0"),
        ({"rank": "all"}, "got 'all'"),
        ({"rank": 2.5}, "got 2.5"),
        ({"lambda_": 2.0}, "lambda is of the method cart, and auto has none"),
        ({"method": "cart", "lambda_": float("nan")}, "lambda must be a finite number"),
        ({"method": "linear", "keep": 2}, "linear keeps all"),
        ({"keep": 0}, "keep must be a positive whole number, got 0"),
        ({"keep": 2, "rank_ratio": 0.1}, "rank_ratio (0.1) and keep (2) are two rules"),
        ({"rank_ratio": 1.5}, "rank_ratio must lie between 0 and 1"),
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"weights": [1, 2]}, "3 adapters but 2 weights"),
        ({"weights": [1, 2, float("inf")]}, "weights must be finite"),
        ({"weights": [1, "2", 3]}, "weights must be finite numbers, got '2'"),
        ({"weights": {"math": 1}}, "weights must be a list, one an adapter"),
        ({"weights": 3}, "weights must be a list, one an adapter"),
        ({"weights": [1, 2, 10**400]}, "weights must be finite numbers, got 1000"),
        ({"method": "cart", "lambda_": 10**400}, "lambda must be a finite number"),
        (
            {"method": "cart", "lambda_": 1e30, "dtype": "float16"},
            "leave the range of torch.float16; take dtype float32 or bfloat16 or a smaller lambda",
        ),
        ({"dtype": ["float32"]}, "dtype must be one of"),
        ({"weights": [0, 0, 0]}, "weights must sum to more than 0"),
        ({"weights": [1, 1, -0.5]}, "auto takes no negative weights"),
        ({"names": ["a", "b"]}, "3 adapters but 2 names"),
        ({"names": ["a", "b", "a"]}, "two adapters are called 'a'"),
        ({"names": ["a", "b", " "]}, "must be a word"),
    ],
)
def test_options(options: dict[str, Any], part: str, trio: list[Path], tmp_path: Path) -> None:
    refuses(trio, part, out=tmp_path / "out", **options)


def test_one_adapter_by_itself(trio: list[Path], tmp_path: Path) -> None:
    for one in (trio[0], str(trio[0])):
        with pytest.raises(CartError, match=r"adapters must be a list, got '.*math' by itself"):
            merge_adapters(one, tmp_path / "out")  # type: ignore[arg-type]


def test_no_adapter_by_an_empty_name_and_none_that_is_too_long(
    trio: list[Path], tmp_path: Path
) -> None:
    for name, part in (("", "an adapter's name is empty"), ("a" * 300, "File name too long")):
        with pytest.raises(CartError, match=part):
            merge_adapters([trio[0], name], tmp_path / "out")
    with pytest.raises(CartError, match="File name too long; name another folder"):
        merge_adapters(trio, tmp_path / ("a" * 300))
    with pytest.raises(CartError, match="is the current folder and cannot be replaced"):
        merge_adapters(trio, "")


def test_a_folder_that_is_there(trio: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    refuses(trio, "exists; name a new folder", out=out)
    assert (out / "mine").exists()


def test_values_that_float16_does_not_hold(own_trio: list[Path]) -> None:
    for adapter in own_trio:
        change_tensors(adapter, lambda held: [held[name].mul_(1e8) for name in held])
    refuses(own_trio, "leave the range of torch.float16", dtype="float16")


def test_a_value_that_json_cannot_hold_is_none(own_trio: list[Path]) -> None:
    file = own_trio[0] / "adapter_config.json"
    file.write_text(json.dumps({"r": 4, "lora_alpha": float("inf")}))
    refuses(own_trio[:1], "inf as the number for")
