"""Models whose files say different things, and folders that are no models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from cart_plugin.compress import compress, expand
from tests.compress.models import answer, load, new_model, save_tasks, tensors
from tests.compress.refused import change, configure, refusal

ROUNDING = 2e-5


@pytest.fixture
def tied_with_heads(tmp_path) -> list[Path]:
    """Configs that tie embeddings and head, and files with a head of its own."""
    models = save_tasks(tmp_path, "llama", num_hidden_layers=1)
    for folder in models:
        configure(folder, tie_word_embeddings=True)
    return models


def test_a_head_of_its_own_counts_whatever_the_config_says(tied_with_heads, tmp_path):
    # transformers 5 loads both tensors where they differ.
    out = tmp_path / "out"
    report = compress(tied_with_heads, out, rank_ratio=1.0)
    assert any("tie model.embed_tokens.weight and lm_head.weight" in note for note in report.notes)
    assert load(out / "base").config.tie_word_embeddings is False
    expand(out, "two", tmp_path / "full")
    there = answer(load(tied_with_heads[1]))
    full = answer(load(tmp_path / "full"))
    adapted = PeftModel.from_pretrained(load(out / "base"), out / "adapters" / "two").eval()
    torch.testing.assert_close(full, there, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(answer(adapted), full, atol=ROUNDING, rtol=ROUNDING)


def test_a_head_that_is_the_embeddings_stays_tied(tied_with_heads, tmp_path):
    for folder in tied_with_heads:
        table = tensors(folder)["model.embed_tokens.weight"]
        change(folder, "lm_head.weight", lambda _, table=table: table.clone())
    report = compress(tied_with_heads, tmp_path / "out", rank_ratio=1.0)
    assert not any("tie" in note for note in report.notes)
    assert load(tmp_path / "out" / "base").config.tie_word_embeddings is True


def test_one_head_of_its_own_unties_all(tied_with_heads, tmp_path):
    for folder in tied_with_heads[1:]:
        table = tensors(folder)["model.embed_tokens.weight"]
        change(folder, "lm_head.weight", lambda _, table=table: table.clone())
    compress(tied_with_heads, tmp_path / "out", rank_ratio=1.0)
    for task, folder in zip(("one", "two"), tied_with_heads, strict=False):
        expand(tmp_path / "out", task, tmp_path / f"full-{task}")
        full = answer(load(tmp_path / f"full-{task}"))
        torch.testing.assert_close(full, answer(load(folder)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("number", [0, 1])
def test_a_config_of_more_layers_than_the_weights_have(number, models, tmp_path):
    configure(models[number], num_hidden_layers=2)
    name = models[number].name
    message = refusal(models, tmp_path)
    assert f"model {name}: config.json describes 9 weights that no file holds" in message
    assert "model.layers.1." in message


def test_a_part_that_no_file_holds_is_named(tmp_path):
    models = save_tasks(tmp_path, "bare-bert", num_hidden_layers=1)
    for folder in models:
        (file,) = folder.glob("*.safetensors") if _single(folder) else (None,)
        kept = {name: t for name, t in load_file(file).items() if not name.startswith("pooler")}
        save_file(kept, file, metadata={"format": "pt"})
    report = compress(models, tmp_path / "out", rank=4)
    told = "no file of one holds pooler.dense.bias and 1 more weights: transformers fills them"
    assert any(note.startswith(told) for note in report.notes)


def _single(folder: Path) -> bool:
    """One file of all shards."""
    held = tensors(folder)
    for file in folder.glob("model*"):
        file.unlink()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return True


def test_an_adapter_is_no_model(models, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(new_model("llama", num_hidden_layers=1), config).save_pretrained(
        tmp_path / "two-lora"
    )
    message = refusal([models[0], tmp_path / "two-lora"], tmp_path)
    assert message.startswith("model two-lora is an adapter, not a model")
    assert "merge_and_unload" in message


def test_packed_integers_are_quantised_weights_and_not_lacking_ones(models, tmp_path):
    # As GPTQ stores them, in a folder whose config does not say so.
    index = json.loads((models[1] / "model.safetensors.index.json").read_text())
    name = "model.layers.0.self_attn.q_proj"
    file = models[1] / index["weight_map"].pop(f"{name}.weight")
    held = load_file(file)
    del held[f"{name}.weight"]
    packed = {
        "qweight": torch.zeros(4, 32, dtype=torch.int32),
        "qzeros": torch.zeros(1, 4, dtype=torch.int32),
        "scales": torch.ones(1, 32),
    }
    for leaf, tensor in packed.items():
        held[f"{name}.{leaf}"] = tensor
        index["weight_map"][f"{name}.{leaf}"] = file.name
    save_file(held, file, metadata={"format": "pt"})
    (models[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(models, tmp_path)
    assert f"model two: tensor '{name}.qweight' is packed torch.int32; quantised weights" in message
