"""What PEFT makes of base and adapters is what `expand` writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from cart_plugin.compress import compress, expand, load_task
from tests.compress.models import KINDS, MIXED, TASKS, answer, load, save_tasks, tensors

# Of fp32, after a few layers: of numbers of the size of these answers.
ROUNDING = 2e-5


def adapted(made, *names: str):
    """The base with some adapters, the last of them active."""
    model = PeftModel.from_pretrained(
        load(made.base), made.adapter(names[0]), adapter_name=names[0]
    )
    for name in names[1:]:
        model.load_adapter(made.adapter(name), name)
        model.set_adapter(name)
    return model.eval()


@pytest.fixture
def expanded(tmp_path):
    def make(made, task: str):
        expand(made.out, task, tmp_path / task)
        return load(tmp_path / task)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_peft_answers_like_the_expanded_model(kind, compressed, expanded):
    made = compressed(kind)
    full = answer(expanded(made, "two"))
    assert (answer(load(made.base)) - full).abs().max() > 100 * ROUNDING  # there is a difference
    torch.testing.assert_close(answer(adapted(made, "two")), full, atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in MIXED])
def test_peft_merges_to_the_expanded_model(kind, compressed, expanded):
    made = compressed(kind)
    merged = adapted(made, "three").merge_and_unload()
    full = answer(expanded(made, "three"))
    torch.testing.assert_close(answer(merged), full, atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_switch_by_name(kind, compressed):
    made = compressed(kind)
    model = adapted(made, *TASKS)
    alone = {task: answer(adapted(made, task)) for task in TASKS}
    for task in (*TASKS, "one"):
        model.set_adapter(task)
        torch.testing.assert_close(answer(model), alone[task], atol=ROUNDING, rtol=ROUNDING)
    with model.disable_adapter():
        torch.testing.assert_close(answer(model), answer(load(made.base)))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "vit", "qwen3-moe", "convnext"])
def test_full_rank_gives_the_models_back(kind, compressed, expanded):
    made = compressed(kind, rank_ratio=1.0)
    for task, folder in zip(TASKS, made.models, strict=True):
        there = answer(load(folder))
        torch.testing.assert_close(answer(expanded(made, task)), there, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(answer(adapted(made, task)), there, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_bf16_models_stay_bf16(kind, tmp_path):
    models = save_tasks(tmp_path, kind, dtype=torch.bfloat16)
    report = compress(models, tmp_path / "out", rank_ratio=0.5)
    for folder in ("base", *(f"adapters/{task}" for task in TASKS)):
        assert {t.dtype for t in tensors(tmp_path / "out" / folder).values()} == {torch.bfloat16}
    expand(tmp_path / "out", "one", tmp_path / "full")
    full = load(tmp_path / "full")
    assert full.dtype == torch.bfloat16
    base = load(tmp_path / "out" / "base", dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, tmp_path / "out" / "adapters" / "one").eval()
    # The full model's weights are rounded once more.
    torch.testing.assert_close(answer(peft), answer(full.float()), atol=0.03, rtol=0.03)
    exact = [entry for entry in report.entries.values() if entry.kind == "exact"]
    assert exact
    assert all(loss.lost == 0 for entry in exact for loss in entry.losses)


def test_heads_of_several_tasks_are_exact(compressed):
    made = compressed("bert")
    for task, folder in zip(TASKS, made.models, strict=True):
        stored = tensors(made.adapter(task))
        head = tensors(folder)["classifier.weight"]
        assert torch.equal(stored["base_model.model.classifier.weight"], head)


def test_a_head_that_is_tied_inside_and_out_is_exact_for_peft_and_expand(compressed):
    made = compressed("bert-mlm")
    for task, folder in zip(TASKS, made.models, strict=True):
        own, stored, found = tensors(folder), tensors(made.adapter(task)), load_task(made.out, task)
        for name in ("cls.predictions.bias", "bert.embeddings.word_embeddings.weight"):
            assert torch.equal(found[name], own[name])
            assert torch.equal(stored[f"base_model.model.{name}"], own[name])
        assert torch.equal(
            stored["base_model.model.cls.predictions.decoder.bias"], own["cls.predictions.bias"]
        )


def test_one_rank_pattern_matches_one_module(compressed):
    made = compressed("llama", energy=0.7)
    model = adapted(made, "one")
    config = json.loads((made.adapter("one") / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    assert not config["alpha_pattern"]
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            entry = made.report.entries[name.removeprefix("base_model.model.") + ".weight"]
            assert module.r["one"] == entry.ranks[0]
            assert module.scaling["one"] == config["lora_alpha"] / entry.ranks[0]


def test_peft_finds_every_tensor_it_looks_for(compressed):
    made = compressed("bert")
    model = PeftModel.from_pretrained(load(made.base), made.adapter("one"))
    found = model.load_adapter(made.adapter("two"), "two")
    assert not found.unexpected_keys
    assert not [key for key in found.missing_keys if ".two." in key]


@pytest.mark.parametrize("kind", ["bare-dinov2", "bare-vit"])
def test_what_peft_cannot_store_is_averaged_with_a_reason(kind, compressed):
    made = compressed(kind)
    entry = made.report.entries["embeddings.position_embeddings"]
    assert entry.kind == "averaged"
    assert "patch_embeddings" in entry.reason
    assert all(loss.lost == loss.difference > 0 for loss in entry.losses)
    assert any("embeddings.cls_token, stay at" in note for note in made.report.notes)


def test_embeddings_of_a_model_with_a_head_are_exact(compressed):
    # There the module's name is no other's end.
    assert compressed("dinov2").report.entries["dinov2.embeddings.cls_token"].kind == "exact"


def test_small_tensors_that_would_bring_experts_along_are_averaged_with_a_reason(compressed):
    made = compressed("gpt-oss")
    layer = "model.layers.1"
    for name in ("self_attn.sinks", "mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"):
        entry = made.report.entries[f"{layer}.{name}"]
        assert entry.kind == "averaged"
        assert "too large to store beside stacked experts" in entry.reason
    kinds = {name: entry.kind for name, entry in made.report.entries.items()}
    for name in ("self_attn.q_proj.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        assert kinds[f"{layer}.{name}"] == "lora"
    assert kinds[f"{layer}.mlp.router.weight"] == kinds["model.norm.weight"] == "exact"


def test_dropping_the_small_leaves_lora_alone(compressed):
    made = compressed("llama", rank_ratio=0.25, drop_small=True)
    names = tensors(made.adapter("one"))
    assert names
    assert all("lora_" in name for name in names)
    kinds = {entry.kind for entry in made.report.entries.values()}
    assert kinds == {"lora", "averaged"}


def test_a_base_is_an_ordinary_checkpoint(compressed):
    made = compressed("llama")
    average = sum(t for t in (tensors(folder)["model.norm.weight"] for folder in made.models)) / 3
    torch.testing.assert_close(tensors(made.base)["model.norm.weight"], average)
    assert set(tensors(made.base)) == set(tensors(made.models[0]))
    assert Path(made.base / "generation_config.json").is_file()
