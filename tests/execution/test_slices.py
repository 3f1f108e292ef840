"""Slices of models whose config has a list of their layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from mergekit.scripts import run_yaml

from cart_plugin.cli import main
from tests.doctor.tiny import SIZES, load_tensors, save_class, write_recipe

LAYERS = {**SIZES, "num_hidden_layers": 4, "num_key_value_heads": 2}


def recipe(folder: Path, models: list[str], *ranges: tuple[int, int]) -> Path:
    """A recipe that stacks layers of the first model, the second, and so on."""
    slices = [
        {"sources": [{"model": model, "layer_range": list(layers)}]}
        for model, layers in zip(models, ranges, strict=False)
    ]
    settings: dict[str, Any] = {"merge_method": "passthrough", "models": None, "slices": slices}
    return write_recipe(folder / "r.yaml", models, **settings)


def doctor(monkeypatch: pytest.MonkeyPatch, file: Path) -> Result:
    monkeypatch.setattr("cart_plugin.doctor.environment.check_environment", lambda show: True)
    return CliRunner().invoke(main, ["doctor", str(file)])


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("ranges", [[(0, 3), (1, 4)], [(0, 2)]], ids=["more", "fewer"])
def test_another_number_of_layers(
    name: str,
    ranges: list[tuple[int, int]],
    merge: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = save_class(tmp_path / "models", name, **LAYERS)
    file = recipe(tmp_path, models, *ranges)
    count = sum(end - first for first, end in ranges)
    found = doctor(monkeypatch, file)
    assert found.exit_code == 1
    assert f"the slices make {count} layers, and mergekit keeps layer_types of 4" in found.output
    assert "mergekit-cart merge RECIPE OUT" in found.output
    theirs = CliRunner().invoke(run_yaml.main, [str(file), str(tmp_path / "theirs")])
    assert "layer_types" in str(theirs.exception)  # and so it is
    done = merge(file, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "problem" not in done.output
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert len(model.config.layer_types) == model.config.num_hidden_layers == count
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_layers_in_another_order_keep_their_kinds(
    merge: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = save_class(tmp_path / "models", "Gemma2ForCausalLM", **LAYERS, head_dim=8)
    kinds = json.loads((Path(models[0]) / "config.json").read_text())["layer_types"]
    assert len(set(kinds)) == 2
    file = recipe(tmp_path, models, (1, 4), (1, 2))
    found = doctor(monkeypatch, file)
    assert found.exit_code == 1
    assert "the config of the result will say layer_types" in " ".join(found.output.split())
    done = merge(file, tmp_path / "out")
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == [*kinds[1:], kinds[1]]
    first = load_tensors(models[0])["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(
        load_tensors(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"], first
    )


def test_layers_as_they_were_are_no_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = save_class(tmp_path / "models", "Gemma2ForCausalLM", **LAYERS, head_dim=8)
    found = doctor(monkeypatch, recipe(tmp_path, models, (0, 2), (2, 4)))
    assert found.exit_code == 0, found.output
