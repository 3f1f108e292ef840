"""What the doctor says of a recipe in `mergekit-cart merge`, which does more than mergekit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests.doctor.conftest import Report, check, doctor
from tests.doctor.tiny import change_config, edit_weights, load_tensors, save_model, write_recipe

Merge = Callable[..., Result]
Saved = Callable[..., list[str]]
__all__ = ["check", "doctor"]  # fixtures


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


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"num_hidden_layers": 7}, "it lacks 18 tensors that it has in other layers"),
        ({"intermediate_size": 48}, "down_proj.weight is (32, 64) and should be (32, 48)"),
        ({"hidden_size": 48}, "is (64, 32) and should be (64, 48)"),
    ],
)
@pytest.mark.parametrize("base", [True, False])
def test_a_config_that_describes_another_model_is_a_problem_before_the_merge(
    base: bool, changes: dict[str, int], fact: str, models: list[str], merge: Merge,
    check: Callable[..., Report], tmp_path: Path,
) -> None:  # fmt: skip
    change_config(models[0], **changes)
    recipe = {"base_model": models[0]} if base else {}
    report = check(models, **recipe)
    report.has_only_problem(f"model {models[0]} is not what its config describes: ", "config.json")
    assert fact in report.text
    done = merge(write_recipe(tmp_path / "r.yaml", models, **recipe), tmp_path / "out")
    assert done.exit_code == 1
    assert f"not merged: model {models[0]} is not what its config describes" in done.output


def test_of_a_model_that_only_gives_weights_the_config_does_not_count(
    models: list[str], merge: Merge, tmp_path: Path
) -> None:
    change_config(models[1], num_hidden_layers=7)
    done = merge(write_recipe(tmp_path / "r.yaml", models), tmp_path / "out")
    assert done.exit_code == 0, done.output
