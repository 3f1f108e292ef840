"""Heads that a file holds beside its class's own: merged where all have them, else left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from benchmarks.architectures import cases
from tests.doctor.tiny import change_config, edit_weights, load_tensors, write_recipe

Merge = Callable[..., Result]
HEADS = {
    "bert.pooler.dense.weight": (32, 32),
    "bert.pooler.dense.bias": (32,),
    "cls.seq_relationship.weight": (2, 32),
    "cls.seq_relationship.bias": (2,),
}


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    architecture = cases.ARCHITECTURES["BERT masked"]
    return list(map(str, cases.save_models(tmp_path, architecture, original=True)))


def add_heads(folder: str) -> None:
    """As bert-base-uncased is published, whose class has one of its heads only."""
    heads = {name: torch.randn(shape) for name, shape in HEADS.items()}
    edit_weights(folder, lambda tensors: tensors.update(heads))


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize(
    "recipe",
    [
        {"merge_method": "task_arithmetic", "base_model": 0, "parameters": {"weight": 0.5}},
        {"merge_method": "linear", "parameters": {"weight": 1.0}},
    ],
)
def test_heads_that_some_models_lack_are_left_out(
    recipe: dict[str, Any], force: bool, models: list[str], merge: Merge, tmp_path: Path
) -> None:
    expected = load_tensors(models[0]).keys()
    add_heads(models[0])
    if "base_model" in recipe:
        recipe = {**recipe, "base_model": models[0]}
    file = write_recipe(tmp_path / "r.yaml", models, **recipe)
    done = merge(file, tmp_path / "out", *(["--force"] if force else []))
    assert done.exit_code == 0, done.output
    assert "left out: 4 tensors (bert.pooler.dense.bias" in done.output.splitlines()[-1]
    assert "BertForMaskedLM does not use" in done.output.splitlines()[-1]
    assert load_tensors(tmp_path / "out").keys() == expected


def test_heads_that_all_models_have_are_merged(
    models: list[str], merge: Merge, tmp_path: Path
) -> None:
    for model in models:
        add_heads(model)
    recipe = {"merge_method": "linear", "parameters": {"weight": 1.0}}
    done = merge(write_recipe(tmp_path / "r.yaml", models, **recipe), tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "left out" not in done.output.splitlines()[-1]
    found, held = load_tensors(tmp_path / "out"), [load_tensors(model) for model in models]
    name = "cls.seq_relationship.weight"
    assert torch.allclose(found[name], torch.stack([own[name] for own in held]).mean(0), atol=1e-6)


def test_layers_of_a_larger_model_are_not_left_out(
    models: list[str], merge: Merge, tmp_path: Path
) -> None:
    layer = "bert.encoder.layer.{}."

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if layer.format(1) in name]:
            tensors[name.replace(layer.format(1), layer.format(2))] = tensors[name].clone()

    edit_weights(models[1], grow)
    change_config(models[1], num_hidden_layers=3)
    recipe = write_recipe(tmp_path / "r.yaml", models)
    done = merge(recipe, tmp_path / "out", "--force")
    assert done.exit_code == 1
    assert "lacks 16 tensors" in done.output.splitlines()[-1]
