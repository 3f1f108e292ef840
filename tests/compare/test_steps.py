"""What a comparison merges and judges, and what it takes for the same when it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cart_plugin.compare.request import comparison_of
from cart_plugin.compare.steps import Comparison, _identity
from cart_plugin.execution.inputs import read_inputs
from tests.doctor.tiny import save_tokenizer, write_recipe

Make = Callable[..., Comparison]


@pytest.fixture
def models(llamas: list[str], tmp_path: Path) -> list[str]:
    return [str(shutil.copytree(model, tmp_path / Path(model).name)) for model in llamas[:3]]


@pytest.fixture
def comparison(tmp_path: Path) -> Make:
    def make(models: list[Any], **recipe: Any) -> Comparison:
        file = write_recipe(tmp_path / "r.yaml", models, **recipe)
        request = {"kind": "function", "name": "x:y"}
        return comparison_of(file, ["linear"], (), (), request, tmp_path / "out", "none", ())

    return make


def key(found: Comparison) -> str:
    return found._merge_key(found.variants[0])


@pytest.mark.parametrize("sign", ["@", "+"])
def test_the_folder_that_the_recipe_names_is_merged_and_judged(
    sign: str, models: list[str], comparison: Make, tmp_path: Path
) -> None:
    other = str(shutil.copytree(models[1], tmp_path / f"llama-0{sign}v2"))
    named = {"model": {"path": other}}
    found = comparison([named, models[2]])
    assert [row.model for row in found.rows()[:2]] == [other, models[2]]
    read = read_inputs(found.variants[0].recipe)
    assert [str(held.path) for held in read.checkpoints.values()] == [other, models[2]]
    # An adapter's base, too: it is fused by a recipe of its own.
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    shutil.copy(Path(models[0]) / "model.safetensors", adapter / "adapter_model.safetensors")
    found = comparison([{**named, "lora": {"path": str(adapter)}}, models[2]])
    (fused,) = found._adapters().values()
    (reference,) = read_inputs(fused.recipe).config.referenced_models()
    assert reference.model.path == other
    assert reference.lora is not None
    assert reference.lora.path == str(adapter)


def test_files_of_what_follows_the_transformer_count(models: list[str], comparison: Make) -> None:
    for model in models:
        Path(model, "1_Pooling").mkdir()
        Path(model, "1_Pooling", "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    before = [_identity(model) for model in models], key(comparison(models))
    for model in models:
        Path(model, "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    named = [_identity(model) for model in models], key(comparison(models))
    for model in models:
        Path(model, "1_Pooling", "config.json").write_text('{"pooling_mode_cls_token": true}')
    changed = [_identity(model) for model in models], key(comparison(models))
    for one, two in ((before, named), (named, changed)):
        assert one[1] != two[1]
        assert all(a != b for a, b in zip(one[0], two[0], strict=True))


@pytest.mark.parametrize("what", ["source", "tokenizer_source", "token", "row"])
def test_the_tokenizers_folder_counts(
    what: str, models: list[str], comparison: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    save_tokenizer(str(folder), 64)
    row = {"kind": "model_token", "model": str(folder), "token_id": 5}
    recipes: dict[str, dict[str, Any]] = {
        "source": {"tokenizer": {"source": str(folder)}},
        "tokenizer_source": {"tokenizer_source": str(folder)},
        "token": {"tokenizer": {"source": "union", "tokens": {"a": {"source": str(folder)}}}},
        "row": {"tokenizer": {"source": "union", "tokens": {"a": {"source": row}}}},
    }
    recipe = recipes[what]
    before = key(comparison(models, **recipe))
    assert key(comparison(models, **recipe)) == before
    save_tokenizer(str(folder), 60, added=2)
    assert key(comparison(models, **recipe)) != before
