"""What the doctor says of a recipe in `mergekit-cart merge`, which does more than mergekit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests.doctor.tiny import change_config, edit_weights, load_tensors, save_model, write_recipe

Merge = Callable[..., Result]
Saved = Callable[..., list[str]]


@pytest.fixture
def models(saved: Saved, tmp_path: Path) -> list[str]:
    """Three Llama models, for a test to change."""
    return [str(shutil.copytree(model, tmp_path / Path(model).name)) for model in saved("llama")]


def test_nothing_is_warned_of_that_merge_does_itself(
    models: list[str], merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in models:
        (Path(model) / "preprocessor_config.json").write_text("{}")
        change_config(model, dtype="float16")
    monkeypatch.chdir(tmp_path)
    names = [Path(model).name for model in models]  # on the hub, for mergekit's card
    done = merge(write_recipe(tmp_path / "r.yaml", names), tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "  warning  " not in done.output


def test_a_tied_base_of_models_with_a_head_needs_no_force(
    models: list[str], merge: Merge, tmp_path: Path
) -> None:
    base = str(save_model(tmp_path / "base", "llama", 9, tie_word_embeddings=True))
    done = merge(write_recipe(tmp_path / "r.yaml", models, base_model=base), tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "  warning  " not in done.output


def test_a_head_that_contradicts_its_own_config_is_a_problem(
    models: list[str], merge: Merge, tmp_path: Path
) -> None:
    change_config(models[1], tie_word_embeddings=True)
    done = merge(write_recipe(tmp_path / "r.yaml", models), tmp_path / "out")
    assert done.exit_code == 1
    assert "tie_word_embeddings" in done.output.splitlines()[-1]
    embeddings = load_tensors(models[1])["model.embed_tokens.weight"]
    edit_weights(models[1], lambda held: held.update({"lm_head.weight": embeddings}))
    done = merge(write_recipe(tmp_path / "r.yaml", models), tmp_path / "out")
    assert done.exit_code == 0, done.output
