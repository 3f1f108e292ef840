"""Keys that mergekit ignores without a word, at every level of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mergekit.config import MergeConfiguration

from cart_plugin.doctor.schema import check_keys
from tests.doctor.conftest import Report

Check = Callable[..., Report]


def found(**recipe: Any) -> list[str]:
    """What is said of the keys of a recipe."""
    findings = check_keys(recipe, MergeConfiguration, {"rank"})
    assert all(finding.level.value == "problem" for finding in findings)
    return [f"{finding.fact}; {finding.advice}" for finding in findings]


def test_a_block_that_is_written_twice(doctor: Check, llamas: list[str], tmp_path: Path) -> None:
    models = "".join(f"- model: {model}\n" for model in llamas)
    settings = "parameters: {rank: 2}\ndtype: float32\nparameters: {svd: exact}\n"
    file = tmp_path / "cart.yaml"
    file.write_text(f"merge_method: cart\nmodels:\n{models}{settings}")
    doctor(file).has_only_problem("'parameters' is written twice", "lines 6 and 8", "as one")


@pytest.mark.parametrize(
    ("tokenizer", "parts"),
    [
        ({"pad_to_multiple": 64}, ("tokenizer.pad_to_multiple is unknown", "pad_to_multiple_of?")),
        ({"source": {"model": "m", "lorra": "l"}}, ("tokenizer.source.lorra", "lora?")),
        ({"tokens": {"<5>": {"forced": True}}}, ("tokenizer.tokens.<5>.forced", "force?")),
        ({"tokens": {"a": {"source": {"model": "m", "lorra": "l"}}}}, ("a.source.lorra", "lora?")),
        ({"tokens": {"a": {"source": {"kind": "zero", "model": "m"}}}}, ("a.source.model", "kind")),
    ],
)
def test_tokenizers(tokenizer: dict[str, Any], parts: tuple[str, ...]) -> None:
    (problem,) = found(tokenizer={"source": "union", **tokenizer})
    assert all(part in problem for part in parts), problem


@pytest.mark.parametrize(
    "source",
    [
        {"kind": "model_token", "model": "m"},
        {"kind": "model_token", "model": "m", "token": "a", "token_id": 1},
        {"kind": "model_tokn", "model": "m", "token": "a"},
        {"model": "m", "token": "a"},
        {"kind": "model_token", "token": "a"},
    ],
    ids=str,
)
def test_a_token_of_a_model_that_mergekit_would_take_for_the_model(source: dict[str, Any]) -> None:
    (problem,) = found(tokenizer={"tokens": {"<5>": {"source": source}}})
    assert "tokenizer.tokens.<5>.source is not a token of a model" in problem
    assert "`kind: model_token`" in problem


def test_a_misspelt_token_is_named_once() -> None:
    source = {"kind": "model_token", "model": "m", "tokn": "a"}
    (problem,) = found(tokenizer={"tokens": {"<5>": {"source": source}}})
    assert "tokenizer.tokens.<5>.source.tokn is unknown" in problem
    assert "did you mean token?" in problem


def test_what_mergekit_knows_is_fine() -> None:
    model = {"model": {"path": "b", "revision": "r"}, "lora": {"path": "l"}}
    token = {"kind": "model_token", "model": model}
    sources: list[Any] = ["m", model, None, {"kind": "zero"}]
    sources += [{**token, "token": "a"}, {**token, "token_id": 1}]
    tokens = {f"<{number}>": {"source": source} for number, source in enumerate(sources)}
    tokenizer = {"source": model, "tokens": tokens, "pad_to_multiple_of": 8}
    slices = [{"sources": [{"model": model, "layer_range": [0, 1]}], "residual_weight": None}]
    assert found(tokenizer=tokenizer, base_model=model, models=[{"model": model}]) == []
    assert found(tokenizer_source=model, slices=slices, modules={"a": {"slices": slices}}) == []


@pytest.mark.parametrize(
    ("recipe", "where"),
    [
        ({"models": [{"model": {"model": {"path": "b"}, "lorra": {}}}]}, "models[0].model.lorra"),
        ({"base_model": {"model": {"path": "b", "revison": 1}}}, "base_model.model.revison"),
        ({"tokenizer_source": {"model": "b", "lorra": "l"}}, "tokenizer_source.lorra"),
        ({"slices": [{"base_model": {"model": "b", "x": 1}}]}, "slices[0].base_model.x"),
        (
            {"modules": {"m": {"models": [{"model": {"model": "b", "lora": {"pth": "l"}}}]}}},
            "modules.m.models[0].model.lora.pth",
        ),
    ],
)
def test_mappings_that_stand_for_models(recipe: dict[str, Any], where: str) -> None:
    (problem,) = found(**recipe)
    assert problem.startswith(f"{where} is unknown and would be ignored; ")


def test_a_misspelt_adapter_would_merge_the_bare_base(check: Check, llamas: list[str]) -> None:
    own = {"model": {"path": llamas[2]}, "lorra": {"path": "/no/such/adapter"}}
    report = check([], models=[{"model": model} for model in (*llamas[:2], own)])
    report.has_only_problem("models[2].model.lorra is unknown", "did you mean lora?")


def test_residual_weight_is_read_by_nothing(check: Check, llamas: list[str]) -> None:
    sources = [{"sources": [{"model": model, "layer_range": [0, 2]}]} for model in llamas[:2]]
    slices = [{**sources[0], "residual_weight": 0.3}, sources[1]]
    report = check([], models=None, slices=slices, merge_method="passthrough")
    report.has_only_problem("slices[0].residual_weight is ignored", "delete it")
