"""What doctor says of a recipe's tokenizer and chat template, and of integers that differ."""

from __future__ import annotations

import shutil
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
from tests.doctor.tiny import edit_weights, load_tensors, save_model, save_tokenizer


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


def test_a_chat_template_needs_a_tokenizer(
    check: Callable[..., Report], own_llamas: list[str], tmp_path: Path
) -> None:
    for template in ("chatml", "auto"):
        check(own_llamas, chat_template=template).has_only_problem(
            f"no tokenizer files in {', '.join(own_llamas)}", "the result would have no tokenizer"
        )
    merged(own_llamas, tmp_path / "out", chat_template="chatml")
    assert not list((tmp_path / "out").glob("*token*"))


@pytest.mark.parametrize("source", ["$wide", {"kind": "zero"}], ids=str)
def test_a_token_beyond_the_bases_rows(
    source: Any, check: Callable[..., Report], spoken: list[str], tmp_path: Path
) -> None:
    wide = str(save_model(tmp_path / "wide", "llama", 9, vocab_size=66))
    save_tokenizer(wide, 64, added=2)
    tokens = {"<more 1>": {"source": wide if source == "$wide" else source}}
    models, base = [*spoken[1:], wide], {"base_model": spoken[0]}
    recipe: dict[str, Any] = {"tokenizer": {"source": "base", "tokens": tokens}}
    check(models, **recipe, **base).has_only_problem(
        f"adds '<more 1>' to the tokenizer of {spoken[0]}, beyond the 64 rows", "`source: union`"
    )
    with pytest.raises(KeyError):
        merged(models, tmp_path / "out", **recipe, **base)
    recipe = {"tokenizer": {"source": "union", "tokens": tokens}}
    assert check(models, **recipe, **base).problems == []
    merged(models, tmp_path / "out", **recipe, **base)


def test_a_token_in_the_bases_spare_rows(
    check: Callable[..., Report], spoken: list[str], tmp_path: Path
) -> None:
    base = str(save_model(tmp_path / "spare", "llama", 8, vocab_size=70))
    save_tokenizer(base, 64)
    wide = str(save_model(tmp_path / "wide", "llama", 9, vocab_size=66))
    save_tokenizer(wide, 64, added=2)
    entry: dict[str, Any] = {"source": wide}
    recipe: dict[str, Any] = {
        "base_model": base,
        "tokenizer": {"source": "base", "tokens": {"<more 1>": entry}},
    }
    report = check([*spoken, wide], **recipe)
    report.has_only_warning(
        f"to the tokenizer of {base}: mergekit takes spare rows", "`force: true`"
    )
    entry["force"] = True
    assert check([*spoken, wide], **recipe).warnings == []
    table = "model.embed_tokens.weight"
    spare, wanted = load_tensors(base)[table][64], load_tensors(wide)[table][65]
    for forced, row in ((False, (spare + 4 * wanted) / 5), (True, wanted)):
        entry["force"] = forced
        merged([base, *spoken, wide], tmp_path / f"out-{forced}", **recipe)
        assert torch.allclose(load_tensors(tmp_path / f"out-{forced}")[table][64], row, atol=1e-6)


@pytest.mark.parametrize(
    ("source", "parts", "error"),
    [
        ({"token_id": 9999}, ("from row 9,999 of", "have 64"), AssertionError),
        ({"token_id": -1}, ("from row -1 of", "have 64"), AssertionError),
        ({"model": "$other", "token": "<3>"}, ("which the recipe does not merge",), ValueError),
        (None, ("names no source of '<5>'",), NotImplementedError),
    ],
    ids=str,
)
def test_a_row_that_no_model_has(
    source: dict[str, Any] | None,
    parts: tuple[str, ...],
    error: type[Exception],
    check: Callable[..., Report],
    spoken: list[str],
    tmp_path: Path,
) -> None:
    other = shutil.copytree(spoken[0], tmp_path / "other")
    if source is not None:
        model = str(other) if "model" in source else spoken[1]
        source = {"kind": "model_token", **source, "model": model}
    tokens: dict[str, Any] = {"<5>": {"source": source}}
    recipe: dict[str, Any] = {"tokenizer": {"source": "union", "tokens": tokens}}
    check(spoken, **recipe).is_clean()  # each model has a row for this token
    tokens["<5>"]["force"] = True
    check(spoken, **recipe).has_only_problem(*parts, "mergekit stops")
    with pytest.raises(error):
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
