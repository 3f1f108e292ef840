"""A recipe as plain data, with other models in the place of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from mergekit.common import ModelReference

from benchmarks.architectures.vision_language import tokenizer
from cart_plugin.execution import request
from cart_plugin.execution.inputs import OrderedConfiguration, plain
from tests.doctor.tiny import load_tensors, save_models, write_recipe


def moved(model: ModelReference) -> ModelReference:
    return ModelReference.model_validate({"model": {"path": f"moved/{model.model.path}"}})


def recipe(tokens: dict[str, Any]) -> OrderedConfiguration:
    return OrderedConfiguration.model_validate(
        {
            "merge_method": "linear",
            "models": [{"model": name, "parameters": {"weight": 1.0}} for name in ("m0", "m1")],
            "tokenizer": {"source": "union", "tokens": tokens},
        }
    )


@pytest.mark.parametrize(
    "source",
    [
        {"kind": "zero"},
        {"kind": "model_token", "model": "m1", "token_id": 5},
        {"kind": "model_token", "model": "m1", "token": "w5"},
        "m1",
    ],
    ids=str,
)
@pytest.mark.parametrize("token", ["w4", "source", "model", "parameters"])
def test_where_a_tokens_row_comes_from_is_kept(token: str, source: Any) -> None:
    config = recipe({token: {"source": source, "force": True}})
    assert OrderedConfiguration.model_validate(plain(config)) == config
    found = OrderedConfiguration.model_validate(plain(config, moved))
    assert found.tokenizer is not None
    assert found.tokenizer.tokens is not None
    kept = found.tokenizer.tokens[token]
    assert kept.force
    if source == "m1":
        assert str(kept.source) == "moved/m1"
    elif source["kind"] == "zero":
        assert kept.source is not None
        assert kept.source.kind == "zero"
    else:
        assert str(kept.source.model) == "moved/m1"
        assert kept.source.model_dump(exclude={"model"}, exclude_none=True) == {
            key: value for key, value in source.items() if key != "model"
        }


@pytest.mark.parametrize("options", [(), ("--workers", 1)], ids=str)
def test_paths_may_hold_spaces(
    options: tuple[Any, ...], merge: Callable[..., Result], tmp_path: Path
) -> None:
    """mergekit 0.1.5 serialises references to them as objects that are no JSON."""
    models = save_models(tmp_path / "my models", "llama", vocab_size=100)
    tokenizer({}).save_pretrained(models[0])
    wanted = write_recipe(
        tmp_path / "my recipe.yaml",
        models,
        merge_method="cart_auto",
        base_model=models[0],
        tokenizer={"source": models[0]},
    )
    done = merge(wanted, tmp_path / "my out", *options)
    assert done.exit_code == 0, done.output
    plainly = save_models(tmp_path / "models", "llama", vocab_size=100)
    wanted = write_recipe(
        tmp_path / "r.yaml", plainly, merge_method="cart_auto", base_model=plainly[0]
    )
    assert merge(wanted, tmp_path / "out", *options).exit_code == 0
    expected = load_tensors(tmp_path / "out")
    found = load_tensors(tmp_path / "my out")
    assert all(torch.allclose(found[name], tensor) for name, tensor in expected.items())


def test_a_forced_token_takes_the_row_that_the_recipe_names(
    merge: Callable[..., Result], tmp_path: Path
) -> None:
    models = save_models(tmp_path / "models", "llama", vocab_size=100, num_hidden_layers=1)
    for model in models:
        tokenizer({}).save_pretrained(model)
    source = {"kind": "model_token", "model": models[1], "token_id": 5}
    tokens = {"w4": {"source": source, "force": True}}
    wanted = write_recipe(
        tmp_path / "r.yaml", models, tokenizer={"source": "union", "tokens": tokens}
    )
    done = merge(wanted, tmp_path / "out")
    assert done.exit_code == 0, done.output
    table = "model.embed_tokens.weight"
    row = load_tensors(tmp_path / "out")[table][4]
    assert torch.allclose(row, load_tensors(models[1])[table][5])


def test_what_pydantic_refuses_is_one_line(
    merge: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        ModelReference.model_validate({"kind": "zero"})

    monkeypatch.setattr(request, "examine", lambda *_: [])
    monkeypatch.setattr(request, "run", refuse)
    done = merge(tmp_path / "r.yaml", tmp_path / "out")
    assert done.exit_code == 1
    (line,) = done.output.strip().splitlines()
    assert line.startswith("Error: 1 validation error for ModelReference model Field required")
