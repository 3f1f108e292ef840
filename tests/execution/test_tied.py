"""Heads that are their embeddings, tensor by tensor: stored, left out, or of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from benchmarks.architectures import cases
from tests.doctor.tiny import change_config, edit_weights, load_tensors, write_recipe

Merge = Callable[..., Result]
HEAD, TABLE = "proj_out.weight", "model.decoder.embed_tokens.weight"
LINEAR = {"merge_method": "linear", "parameters": {"weight": 1.0}}


def save(name: str, folder: Path) -> list[str]:
    return list(map(str, cases.save_models(folder, cases.ARCHITECTURES[name], original=True)))


def untie(folder: str, seed: int) -> None:
    torch.manual_seed(seed)
    edit_weights(folder, lambda held: held.update({HEAD: torch.randn_like(held[TABLE])}))
    change_config(folder, tie_word_embeddings=False)


@pytest.mark.parametrize("model", [0, 1])
@pytest.mark.parametrize(
    ("name", "head", "table"),
    [
        ("Whisper", HEAD, TABLE),
        (
            "BERT masked",
            "cls.predictions.decoder.weight",
            "bert.embeddings.word_embeddings.weight",
        ),
        ("T5 1.0", "lm_head.weight", "shared.weight"),
    ],
)
def test_a_stored_copy_of_a_tied_head_is_no_difference(
    name: str, head: str, table: str, model: int, merge: Merge, tmp_path: Path
) -> None:
    models = save(name, tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", models, **LINEAR)
    assert merge(recipe, tmp_path / "out").exit_code == 0
    expected = load_tensors(tmp_path / "out")
    edit_weights(models[model], lambda held: held.update({head: held[table].clone()}))
    done = merge(recipe, tmp_path / "again")
    assert done.exit_code == 0, done.output
    found = load_tensors(tmp_path / "again")
    if model == 0:  # what the first model's file holds is written
        assert torch.equal(found.pop(head), found[table])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("tied", [0, 1])
def test_heads_of_their_own_are_merged_with_a_tied_models_embedding(
    tied: int, merge: Merge, tmp_path: Path
) -> None:
    models = save("Whisper", tmp_path)
    for seed, model in enumerate(models):
        if seed != tied:
            untie(model, seed)
    recipe = write_recipe(tmp_path / "r.yaml", models, **LINEAR)
    done = merge(recipe, tmp_path / "out", "--force")
    assert done.exit_code == 0, done.output
    held = [load_tensors(model) for model in models]
    heads = torch.stack([tensors.get(HEAD, tensors[TABLE]) for tensors in held])
    found = load_tensors(tmp_path / "out")
    assert torch.allclose(found[HEAD], heads.mean(0), atol=1e-6)
    assert not torch.equal(found[HEAD], found[TABLE])
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
