"""What doctor says of a recipe's tokenizer and chat template, and of integers that differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from tests.doctor.conftest import Report
from tests.doctor.tiny import edit_weights, save_tokenizer


@pytest.fixture
def spoken(own_llamas: list[str]) -> list[str]:
    """Three Llama models with tokenizers."""
    for folder in own_llamas:
        save_tokenizer(folder, 64)
    return own_llamas


def merged(models: list[str], out: Path, **recipe: Any) -> None:
    entries = [{"model": model} for model in models]
    config = MergeConfiguration.model_validate(
        {"merge_method": "linear", "models": entries, "parameters": {"weight": 1}, **recipe}
    )
    run_merge(config, str(out), MergeOptions(quiet=True, write_model_card=False))


@pytest.mark.parametrize(
    "recipe",
    [
        {"tokenizer": {"source": "union"}},
        {"tokenizer": {"source": "base"}},
        {"tokenizer": {"tokens": {"<3>": {"source": "$second"}}}},
        {"tokenizer": {"tokens": {"new": {"source": {"kind": "zero"}}}}},
        {"chat_template": "chatml"},
        {"chat_template": "auto"},
        {"chat_template": "{% for message in messages %}{{ message }}{% endfor %}"},
    ],
    ids=str,
)
def test_what_mergekit_takes(
    recipe: dict[str, Any], check: Callable[..., Report], spoken: list[str], tmp_path: Path
) -> None:
    tokens = recipe.get("tokenizer", {}).get("tokens", {})
    if tokens.get("<3>"):
        recipe = {"tokenizer": {"tokens": {"<3>": {"source": spoken[1]}}}}
    check(spoken, **recipe).is_clean()
    merged(spoken, tmp_path / "out", **recipe)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_models_without_a_tokenizer(
    check: Callable[..., Report], own_llamas: list[str], tmp_path: Path
) -> None:
    recipe: dict[str, Any] = {"tokenizer": {"source": "union"}}
    check(own_llamas, **recipe).has_only_problem(
        f"no tokenizer files in {', '.join(own_llamas)}, which mergekit begins with",
        "mergekit stops",
        "save a tokenizer there",
    )
    with pytest.raises((OSError, ValueError)):
        merged(own_llamas, tmp_path / "out", **recipe)
    # With a base it begins with that, and takes it that the others' are the same.
    save_tokenizer(own_llamas[0], 64)
    assert check(own_llamas[1:], **recipe, base_model=own_llamas[0]).problems == []
    merged(own_llamas[1:], tmp_path / "out", **recipe, base_model=own_llamas[0])
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ({"tokenizer_source": "./nowhere"}, ("tokenizer ./nowhere does not exist",)),
        (
            {"chat_template": "chatmll"},
            ("chat_template 'chatmll' is neither", "no tokenizer", "alpaca, chatml, exaone"),
        ),
    ],
    ids=str,
)
def test_what_it_does_not_take(
    recipe: dict[str, Any], parts: tuple[str, ...], check: Callable[..., Report], spoken: list[str]
) -> None:
    check(spoken, **recipe).has_only_problem(*parts)


@pytest.mark.parametrize("kind", ["model", "model_token"])
def test_a_token_that_its_source_lacks(
    kind: str, check: Callable[..., Report], spoken: list[str], tmp_path: Path
) -> None:
    source: Any = spoken[1]
    if kind == "model_token":
        source = {"kind": kind, "model": spoken[1], "token": "nope"}
    recipe = {"tokenizer": {"tokens": {"nope": {"source": source}}}}
    check(spoken, **recipe).has_only_problem(
        f"tokenizer.tokens takes 'nope' from {spoken[1]}, whose tokenizer has no 'nope'"
    )
    with pytest.raises(AssertionError, match="not found"):
        merged(spoken, tmp_path / "out", **recipe)


def test_counters_that_differ(check: Callable[..., Report], tmp_path: Path) -> None:
    files = []
    for number in range(3):
        files.append(str(tmp_path / f"{number}.safetensors"))
        counter = torch.tensor(number)
        save_file({"a.weight": torch.randn(20, 20), "bn.num_batches_tracked": counter}, files[-1])
    check(files).has_only_problem(
        "the models differ in 1 integer tensor (bn.num_batches_tracked)", "make them equal"
    )
    for file in files:
        save_file(load_file(file) | {"bn.num_batches_tracked": torch.tensor(3)}, file)
    check(files).is_clean()


def test_counters_of_whole_models_are_for_mergekit_cart_merge(
    check: Callable[..., Report], tmp_path: Path
) -> None:
    config = transformers.Wav2Vec2ConformerConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    folders = []
    name = "wav2vec2_conformer.encoder.layers.0.conv_module.batch_norm.num_batches_tracked"
    for number in range(3):
        folders.append(str(tmp_path / str(number)))
        transformers.Wav2Vec2ConformerForCTC(config).save_pretrained(folders[-1])
        edit_weights(folders[-1], lambda held, at=number: held.update({name: torch.tensor(at)}))
    report = check(folders)
    found = [line for line in report.problems if "differ in 1 integer tensor" in line]
    assert len(found) == 1, report.text
    assert name in found[0]
    assert "merge with `mergekit-cart merge`, which keeps the largest count" in found[0]
