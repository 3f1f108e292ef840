"""Adapters that differ in rank, scale and what they change, and tensors beside A and B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from cart_plugin import CartError, CartSettings, merge_state_dicts
from cart_plugin.adapters import merge_adapters
from tests.adapters.lora import (
    change_config,
    change_tensors,
    config_of,
    farthest,
    save_base,
    save_loras,
    state,
    tensors,
    whole,
)

AUTO = CartSettings(lambda_="auto")
OTHERS: dict[str, dict[str, Any]] = {
    "ranks": {"r": 6},
    "alphas": {"lora_alpha": 3},
    "rslora": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"q_proj": 2, r"^model\.layers\.1\.self_attn\.v_proj": 7}},
    "alpha pattern": {"alpha_pattern": {"layers.0.self_attn.q_proj": 1.5}},
    "both, rslora": {
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"v_proj": 5},
        "use_rslora": True,
    },
    "fewer modules": {"target_modules": ["q_proj"]},
    "other modules": {"target_modules": ["up_proj", "down_proj"]},
    "one layer": {"layers_to_transform": [1]},
    "the first layer": {"layers_to_transform": 0},
    "gaussian start": {"init_lora_weights": "gaussian"},
    "start from the least directions": {"init_lora_weights": "mica"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "bias of B": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
}


@pytest.mark.parametrize("name", OTHERS)
def test_one_of_another_kind_beside_two_plain_ones(name: str, tmp_path: Path) -> None:
    base = save_base(tmp_path, "qwen2", num_hidden_layers=2)  # q and v have biases
    adapters = save_loras(tmp_path, base, [{}, OTHERS[name], {}])
    report = merge_adapters(adapters, tmp_path / "out", rank="full")
    assert farthest(state(base, tmp_path / "out"), whole(base, adapters, AUTO)) < 1e-6
    written = config_of(tmp_path / "out")
    assert written["r"] == written["lora_alpha"] == report.rank
    assert written["rank_pattern"] == written["alpha_pattern"] == {}
    assert not written["use_rslora"]
    shapes = {tensor.shape[0] for name, tensor in tensors(tmp_path / "out").items() if "A" in name}
    assert shapes == {report.rank}


def test_a_module_that_one_lacks_is_told(base: Path, tmp_path: Path) -> None:
    adapters = save_loras(tmp_path, base, [{}, {"target_modules": ["q_proj"]}])
    report = merge_adapters(adapters, tmp_path / "out")
    expected = "code lacks 2 of 4 modules, such as model.layers.0.self_attn.v_proj"
    assert any(expected in note for note in report.notes), report.notes


def test_of_no_common_module_the_average_and_more(base: Path, tmp_path: Path) -> None:
    configs = [{"target_modules": ["q_proj"]}, {"target_modules": ["v_proj"]}]
    adapters = save_loras(tmp_path, base, configs)
    merge_adapters(adapters, tmp_path / "out", rank="full")
    assert farthest(state(base, tmp_path / "out"), whole(base, adapters, AUTO)) < 1e-6


def test_gpt2_holds_its_matrices_the_other_way_round(tmp_path: Path) -> None:
    """Their inputs are those of A. A merge of whole models takes the outputs for them."""
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    torch.manual_seed(0)
    base = tmp_path / "base"
    transformers.GPT2LMHeadModel(config).save_pretrained(base)
    settings = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    adapters = save_loras(tmp_path, base, [{}, {}, {}], **settings)

    def turned(adapter: Path | None = None) -> dict[str, Tensor]:
        held = state(base, adapter).items()
        return {name: tensor.T if "c_" in name else tensor for name, tensor in held}

    expected = merge_state_dicts([turned(one) for one in adapters], AUTO, base=turned())
    merge_adapters(adapters, tmp_path / "out", rank="full")
    assert farthest(turned(tmp_path / "out"), expected) < 1e-6
    merge_adapters(adapters, tmp_path / "cart", method="cart", rank="full")
    assert farthest(state(base, tmp_path / "cart"), whole(base, adapters, CartSettings())) < 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_averaged(tied: bool, tmp_path: Path) -> None:
    base = save_base(tmp_path, num_hidden_layers=2, tie_word_embeddings=tied)
    adapters = save_loras(tmp_path, base, [{}, {}, {}], target_modules=["q_proj", "embed_tokens"])
    for adapter in adapters:  # PEFT adds the base's own table
        change_tensors(
            adapter, lambda held: [held.pop(name) for name in list(held) if "base_layer" in name]
        )
    report = merge_adapters(adapters, tmp_path / "out", rank="full")
    assert any("tables of tokens and the like (" in note for note in report.notes)
    assert any("no linear layers but tables of tokens" in note for note in report.notes)
    assert farthest(state(base, tmp_path / "out"), whole(base, adapters, AUTO)) < 1e-6


def test_the_bases_own_table_beside_its_lora_stays(base: Path, tmp_path: Path) -> None:
    adapters = save_loras(tmp_path, base, [{}, {}], target_modules=["embed_tokens"])
    assert any("base_layer" in name for name in tensors(adapters[0]))
    report = merge_adapters(adapters, tmp_path / "out", rank="full")
    assert farthest(state(base, tmp_path / "out"), whole(base, adapters, AUTO)) < 1e-6
    assert any("embed_tokens.base_layer.weight is kept" in note for note in report.notes)
    assert not any("hold whole" in note for note in report.notes)


@pytest.mark.parametrize(
    "common",
    [
        {"modules_to_save": ["norm", "embed_tokens"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    ],
)
def test_modules_that_are_saved_whole_are_averaged(common: dict[str, Any], tmp_path: Path) -> None:
    base = save_base(tmp_path, num_hidden_layers=2)
    adapters = save_loras(tmp_path, base, [{}, {}, {}], **common)
    report = merge_adapters(adapters, tmp_path / "out", rank="full")
    assert farthest(state(base, tmp_path / "out"), whole(base, adapters, AUTO)) < 1e-6
    assert any(
        "averaged is what the adapters hold whole" in note and "vLLM" in note
        for note in report.notes
    )
    assert config_of(tmp_path / "out")["modules_to_save"] == sorted(common["modules_to_save"])


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_averaged(bias: str, tmp_path: Path) -> None:
    base = save_base(tmp_path, "qwen2", num_hidden_layers=2)
    adapters = save_loras(tmp_path, base, [{}, {}, {}], bias=bias)
    merge_adapters(adapters, tmp_path / "out", rank="full")
    assert farthest(state(base, tmp_path / "out"), whole(base, adapters, AUTO)) < 1e-6
    assert config_of(tmp_path / "out")["bias"] == bias


@pytest.mark.parametrize(
    ("architecture", "modules"),
    [
        ("bert-classifier", None),
        ("bert-classifier", ["pooler", "classifier"]),
        ("roberta-classifier", None),  # whose head is a module of modules
    ],
)
def test_all_biases_beside_a_head(
    architecture: str, modules: list[str] | None, tmp_path: Path
) -> None:
    """Of the head's, PEFT saves the base's own, too, and the trained one twice."""
    kind = transformers.AutoModelForSequenceClassification
    base = save_base(tmp_path, architecture, num_labels=3)
    common = {"target_modules": ["query"], "task_type": "SEQ_CLS", "kind": kind, "bias": "all"}
    adapters = save_loras(tmp_path, base, [{}, {}], modules_to_save=modules, **common)
    merge_adapters(adapters, tmp_path / "out", rank="full")
    assert not any("original_module" in name for name in tensors(tmp_path / "out"))
    found = state(base, tmp_path / "out", kind)
    expected = [state(base, adapter, kind) for adapter in adapters]
    trained = [name for name in found if name.endswith("bias") or "classifier" in name]
    trained += [name for name in found if modules and "pooler" in name]
    for name in trained:
        assert torch.allclose(found[name], sum(one[name] for one in expected) / 2, atol=1e-6)
        assert not torch.allclose(expected[0][name], expected[1][name], atol=1e-3), name


def test_counters_of_a_saved_norm_are_the_largest(tmp_path: Path) -> None:
    kind = transformers.AutoModelForImageClassification
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3, layer_type="basic"
    )
    base = tmp_path / "base"
    transformers.ResNetForImageClassification(config).save_pretrained(base)
    saved = {"target_modules": ["convolution"], "modules_to_save": ["normalization", "classifier"]}
    adapters = save_loras(tmp_path, base, [saved, saved], kind=kind)
    for adapter, batches in zip(adapters, (7, 5), strict=True):

        def count(held: dict[str, Tensor], batches: int = batches) -> None:
            names = [name for name in held if name.endswith("num_batches_tracked")]
            assert names
            held |= {name: torch.tensor(batches) for name in names}

        change_tensors(adapter, count)
    merge_adapters(adapters, tmp_path / "out", rank="full", dtype="bfloat16")
    for name, tensor in state(base, tmp_path / "out", kind).items():
        if "normalization" in name and name.endswith("num_batches_tracked"):
            assert tensor == 7
            assert tensor.dtype == torch.int64


def test_integers_that_all_hold_alike_are_kept(own_trio: list[Path], tmp_path: Path) -> None:
    """Positions, such as old models have beside their embeddings: nothing is quantised."""
    prefix = "base_model.model.model"
    held = {f"{prefix}.position_ids": torch.arange(5)[None], f"{prefix}.mask": torch.eye(3) > 0}
    for adapter in own_trio:
        change_tensors(adapter, lambda own: own.update(held))
    report = merge_adapters(own_trio, tmp_path / "out", dtype="bfloat16")
    found = tensors(tmp_path / "out")
    for name, tensor in held.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    assert not any("averaged" in note for note in report.notes)


@pytest.mark.parametrize("other", [["v_proj"], ["q_proj", "up_proj"]])
def test_all_biases_beside_lora_of_different_modules(other: list[str], tmp_path: Path) -> None:
    """PEFT calls one bias by two names: with LoRA of its module, and without."""
    base = save_base(tmp_path, "qwen2", num_hidden_layers=2)
    configs = [{"target_modules": ["q_proj"]}, {"target_modules": other}, {}]
    adapters = save_loras(tmp_path, base, configs, bias="all")
    report = merge_adapters(adapters, tmp_path / "out", rank="full")
    assert farthest(state(base, tmp_path / "out"), whole(base, adapters, AUTO)) < 1e-6
    assert any("hold whole (base_model.model.model.layers.0" in note for note in report.notes)


def test_a_classifiers_head(tmp_path: Path) -> None:
    kind = transformers.AutoModelForSequenceClassification
    base = save_base(tmp_path, "bert-classifier", num_labels=3)
    common = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "kind": kind}
    adapters = save_loras(tmp_path, base, [{}, {}, {}], **common)
    report = merge_adapters(adapters, tmp_path / "out", rank="full")
    found, expected = state(base, tmp_path / "out", kind), whole(base, adapters, AUTO, kind=kind)
    body = [name for name in found if "classifier" not in name]
    assert farthest({k: found[k] for k in body}, {k: expected[k] for k in body}) < 1e-6
    heads = [state(base, adapter, kind)["classifier.weight"] for adapter in adapters]
    assert torch.allclose(found["classifier.weight"], sum(heads) / 3, atol=1e-6)
    assert any("base_model.model.classifier" in note for note in report.notes)
    assert config_of(tmp_path / "out")["task_type"] == "SEQ_CLS"


def test_pefts_automatic_class_finds_the_base(tmp_path: Path) -> None:
    """Of models without a task type it goes by what the adapters say of their class."""
    base = save_base(tmp_path, "bert-classifier", num_labels=3)
    kind = transformers.AutoModelForSequenceClassification
    adapters = save_loras(tmp_path, base, [{}, {}], target_modules=["query"], kind=kind)
    merge_adapters(adapters, tmp_path / "out")
    model = peft.AutoPeftModel.from_pretrained(str(tmp_path / "out"))
    assert type(model.get_base_model()) is transformers.BertForSequenceClassification
    change_config(adapters[0], auto_mapping={"base_model_class": "BertModel"})
    merge_adapters(adapters, tmp_path / "unlike")
    assert config_of(tmp_path / "unlike")["auto_mapping"] is None


@pytest.mark.parametrize("pattern", ["attention", "out_proj"])
def test_an_attention_of_torch_has_one_scale(pattern: str, tmp_path: Path) -> None:
    """PEFT wraps its output inside, and patterns with that name are for other layers."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
    config = transformers.SiglipVisionConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    torch.manual_seed(0)
    base, kind = tmp_path / "base", transformers.AutoModel
    transformers.SiglipVisionModel(config).save_pretrained(base)
    configs = [{}, {"alpha_pattern": {pattern: 3}}, {}]
    common = {"target_modules": ["attention", "q_proj"], "kind": kind}
    adapters = save_loras(tmp_path, base, configs, **common)
    assert any("attention.base_layer.out_proj" in name for name in tensors(adapters[0]))
    merge_adapters(adapters, tmp_path / "out", rank="full")
    found, expected = state(base, tmp_path / "out", kind), whole(base, adapters, AUTO, kind=kind)
    assert farthest(found, expected) < 1e-6


def test_of_stacked_experts_patterns_of_the_module_do_not_count(tmp_path: Path) -> None:
    """PEFT looks for the parameter's name, which ends otherwise."""
    base = save_base(tmp_path, "qwen3-moe")
    patterns = {"alpha_pattern": {"mlp.experts": 64}, "rank_pattern": {"experts": 3}}
    common = {"target_parameters": ["mlp.experts.down_proj"], "target_modules": ["q_proj"]}
    adapters = save_loras(tmp_path, base, [{}, patterns], **common)
    merge_adapters(adapters, tmp_path / "out", rank="full")
    assert farthest(state(base, tmp_path / "out"), whole(base, adapters, AUTO)) < 1e-6


def test_a_key_that_this_peft_does_not_know_changes_nothing(
    own_trio: list[Path], trio: list[Path], tmp_path: Path
) -> None:
    change_config(own_trio[0], written_by="someone's trainer")
    report = merge_adapters(own_trio, tmp_path / "out")
    assert not report.notes
    merge_adapters(trio, tmp_path / "again")
    assert farthest(tensors(tmp_path / "out"), tensors(tmp_path / "again")) == 0


@pytest.mark.parametrize(
    ("version", "is_told"),
    [
        ("99.1.dev0@3f2c1ab", True),
        ("99.1", True),
        (peft.__version__, False),
        ("0.1", False),
        ("unknown", False),
    ],
)
def test_a_key_of_a_newer_peft_is_told(
    version: str, is_told: bool, own_trio: list[Path], tmp_path: Path
) -> None:
    new = {"use_next": {"rank": 2}, "use_nothing": False, "peft_version": version}
    change_config(own_trio[0], **new)
    notes = merge_adapters(own_trio, tmp_path / "out").notes
    told = f"and the installed {peft.__version__} does not know use_next of its"
    assert len(notes) == is_told
    assert all(f"adapter math is of PEFT {version}, {told}" in note for note in notes)


def test_a_variant_that_the_installed_peft_does_not_know_is_refused(
    own_trio: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = peft.LoraConfig.to_dict

    def as_before(config: peft.LoraConfig) -> dict[str, Any]:
        return {key: value for key, value in real(config).items() if key != "use_qalora"}

    monkeypatch.setattr(peft.LoraConfig, "to_dict", as_before)
    change_config(own_trio[0], use_qalora=True)
    with pytest.raises(CartError, match="QA-LoRA"):
        merge_adapters(own_trio, tmp_path / "out")
