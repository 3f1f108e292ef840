"""What doctor says of the config, tokenizer and processor that mergekit saves with a result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.doctor.conftest import Report
from tests.doctor.tiny import (
    LLAVA,
    MISTRAL3,
    change_config,
    edit_weights,
    load_tensors,
    save_class,
    save_model,
    save_models,
    save_tokenizer,
)


def merge(folders: list[str], out: Path, **recipe: Any) -> None:
    """Merge them with mergekit itself."""
    entries = [{"model": folder} for folder in folders]
    config = MergeConfiguration.model_validate(
        {"merge_method": "cart", "models": entries, **recipe}
    )
    run_merge(config, str(out), MergeOptions(quiet=True, write_model_card=False))


# Tied or not


def test_a_tied_base_of_models_with_a_head(check: Callable[..., Report], tmp_path: Path) -> None:
    base = str(save_model(tmp_path / "base", "llama", 0, tie_word_embeddings=True))
    tuned = save_models(tmp_path, "llama", tie_word_embeddings=False)
    report = check(tuned, base_model=base)
    assert any(
        f"lm_head.weight comes from {tuned[0]}" in warning
        and f"the config (of model {base}) ties it to the embeddings" in warning
        and '"tie_word_embeddings": false' in warning
        for warning in report.warnings
    )
    merge(tuned, tmp_path / "out", base_model=base)  # and so it is
    held = load_tensors(tmp_path / "out")
    assert not torch.equal(held["lm_head.weight"], held["model.embed_tokens.weight"])
    assert AutoConfig.from_pretrained(tmp_path / "out").tie_word_embeddings


def test_tied_models_that_store_a_copy_are_fine(
    check: Callable[..., Report], tmp_path: Path
) -> None:
    tuned = save_models(tmp_path, "llama", tie_word_embeddings=True)
    for folder in tuned:
        edit_weights(
            folder,
            lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()}),
        )
    check(tuned).is_clean()


# Dtypes


def test_a_config_of_another_dtype_than_is_saved(
    check: Callable[..., Report], own_llamas: list[str], tmp_path: Path
) -> None:
    for folder, dtype in zip(own_llamas, ("float16", "bfloat16", "bfloat16"), strict=True):
        edit_weights(
            folder,
            lambda held, dtype=dtype: held.update(
                {name: tensor.to(getattr(torch, dtype)) for name, tensor in held.items()}
            ),
        )
        change_config(folder, dtype=dtype)
    report = check(own_llamas)
    report.has_only_warning(
        "saved as float32, to which the inputs promote, with a config that says float16",
        "or another: without base_model mergekit takes any",
        "write `dtype: float16` or `dtype: float32`",
    )
    merge(own_llamas, tmp_path / "out")
    assert {tensor.dtype for tensor in load_tensors(tmp_path / "out").values()} == {torch.float32}
    written = json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]
    assert written in ("float16", "bfloat16")
    check(own_llamas, dtype="bfloat16").is_clean()
    check(own_llamas[1:], base_model=own_llamas[0], dtype="float32").has_only_warning("two models")


# Tokens


def test_a_tokenizer_with_more_ids_than_rows(
    check: Callable[..., Report], own_llamas: list[str], tmp_path: Path
) -> None:
    for folder in own_llamas:
        save_tokenizer(folder, 64)
    check(own_llamas).is_clean()
    save_tokenizer(own_llamas[1], 64, added=2)
    report = check(own_llamas)
    report.has_only_warning(
        f"model {own_llamas[1]}: its tokenizer has ids up to 65 and its embeddings 64 rows",
        "resize_token_embeddings(66)",
    )


def test_aligning_such_tokenizers(
    check: Callable[..., Report], own_llamas: list[str], tmp_path: Path
) -> None:
    wide = str(save_model(tmp_path / "wide", "llama", 9, vocab_size=66))
    save_tokenizer(wide, 64, added=2)
    for folder in own_llamas:
        save_tokenizer(folder, 64)
    union = {"tokenizer": {"source": "union"}}
    # Nobody has rows for these tokens: mergekit leaves them out.
    save_tokenizer(own_llamas[1], 64, added=2)
    report = check(own_llamas, **union)
    report.has_only_warning(own_llamas[1], "mergekit leaves such tokens out")
    merge(own_llamas, tmp_path / "out", **union)
    # Another model has.
    models = [*own_llamas, wide]
    report = check(models, **union)
    report.has_only_problem(own_llamas[1], "mergekit stops when it aligns them")
    # Without a base mergekit takes the first of a set, another one in each process.
    union["base_model"] = wide
    report = check(models, **union)
    report.has_only_problem(own_llamas[1], "mergekit stops when it aligns them")
    with pytest.raises(KeyError):
        merge(models, tmp_path / "other", **union)
    # It strips the base's tokenizer of them.
    union["base_model"] = own_llamas[1]
    report = check(models, **union)
    report.has_only_warning(own_llamas[1], "mergekit leaves such tokens out")
    merge(models, tmp_path / "stripped", **union)


def test_numbers_of_another_tokenizer(
    check: Callable[..., Report], own_llamas: list[str], tmp_path: Path
) -> None:
    base, *tuned = own_llamas
    for folder in own_llamas:
        save_tokenizer(folder, 64, backwards=folder == tuned[0])
    change_config(base, bos_token_id=1, eos_token_id=[2, 5])
    recipe = {"base_model": base, "tokenizer_source": tuned[0], "merge_method": "cart_auto"}
    check(tuned, **recipe).has_only_warning(
        f"the config of model {base} names have other numbers in the result",
        "bos_token_id 1 ('<1>'), there '<62>', eos_token_id 2 ('<2>'), there '<61>'",
        "mergekit-cart merge RECIPE OUT",
    )
    (Path(base) / "generation_config.json").write_text('{"eos_token_id": [2, 6]}')
    warnings = check(tuned, **recipe).warnings
    assert len(warnings) == 2, warnings
    assert "copy from there into the result (with the new tokenizer's ids), or" in warnings[1]
    merge(tuned, tmp_path / "out", **recipe)  # and so it is
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out").bos_token_id == 62
    (Path(base) / "generation_config.json").unlink()
    for same in ({"tokenizer_source": "base"}, {"tokenizer_source": "union"}):
        check(tuned, **{**recipe, **same}).is_clean()


@pytest.mark.parametrize("added", [0, 2])
def test_numbers_beyond_the_new_vocabulary(
    added: int, check: Callable[..., Report], own_llamas: list[str], tmp_path: Path
) -> None:
    base = str(save_model(tmp_path / "base", "llama", 9, vocab_size=66, pad_token_id=65))
    save_tokenizer(base, 64, added=added)  # without these, 65 is no token
    for folder in own_llamas:
        save_tokenizer(folder, 64)
    source = own_llamas[0] if added else "base"
    recipe: dict[str, Any] = {"base_model": base, "tokenizer": {"source": source}}
    check(own_llamas, **recipe).has_only_problem(
        f"the config of model {base} names lie beyond the 64 of the result",
        "pad_token_id 65" + (" ('<more 1>')" if added else ""),
    )
    merge(own_llamas, tmp_path / "out", **recipe)
    with pytest.raises(AssertionError, match="Padding_idx"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    recipe["tokenizer"]["pad_to_multiple_of"] = 48
    assert check(own_llamas, **recipe).problems == []


def test_an_image_token_that_the_new_tokenizer_lacks(
    check: Callable[..., Report], tmp_path: Path
) -> None:
    folders = save_class(tmp_path, "LlavaForConditionalGeneration", False, **LLAVA)
    save_tokenizer(folders[0], 64)
    for folder in folders[1:]:
        save_tokenizer(folder, 60)
    base, *tuned = folders
    recipe = {"base_model": base, "tokenizer": {"source": tuned[0]}}
    check(tuned, **recipe).has_only_problem(
        f"lacks what model {base} cannot be without", "image_token_index 60 ('<60>')"
    )


# Quantisation


@pytest.mark.parametrize("part", [None, "text_config"])
def test_weights_that_are_no_longer_quantised(
    part: str | None, check: Callable[..., Report], own_llamas: list[str], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    change_config(own_llamas[0], **({part: settings} if part else settings))
    report = check(own_llamas)
    report.has_only_warning("a config that has a quantization_config", "mergekit-cart merge RECIPE")
    if part is None:
        base = {"base_model": own_llamas[0], "merge_method": "cart_auto"}
        merge(own_llamas[1:], tmp_path / "out", **base)
        with pytest.raises(ImportError):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    online = {"quant_method": "bitnet", "quantization_mode": "online"}
    change_config(own_llamas[0], quantization_config=online, text_config=None)
    check(own_llamas).is_clean()  # the model's own way to compute with such weights


# Files


def test_files_that_are_left_behind(
    check: Callable[..., Report], own_llamas: list[str], tmp_path: Path
) -> None:
    for folder in own_llamas:
        save_tokenizer(folder, 64)
    everywhere = ["preprocessor_config.json", "processor_config.json", "chat_template.json"]
    for folder in own_llamas:
        for name in everywhere:
            (Path(folder) / name).write_text("{}")
    (Path(own_llamas[2]) / "modeling_own.py").write_text("")
    for notes in ("notes.txt", "convert.py", "results.json"):
        (Path(own_llamas[1]) / notes).write_text("mine")
    report = check(own_llamas)
    assert report.problems == []
    first, *others = report.warnings
    assert f"lack preprocessor_config.json, processor_config.json of model {own_llamas[0]}" in first
    assert "mergekit-cart merge RECIPE OUT" in first
    assert len(others) == 1, others
    assert f"lack modeling_own.py of model {own_llamas[2]}" in others[0]
    merge(own_llamas, tmp_path / "out")  # and so it is
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"chat_template.json", "tokenizer.json", "generation_config.json"} <= written
    assert not {"preprocessor_config.json", "processor_config.json"} & written


def test_what_is_lost_without_a_tokenizer(
    check: Callable[..., Report], own_llamas: list[str], tmp_path: Path
) -> None:
    save_tokenizer(own_llamas[1], 64)  # the others have none
    report = check(own_llamas)
    report.has_only_warning(
        f"the result may lack tokenizer.json of model {own_llamas[1]}: without base_model"
    )
    base = {"base_model": own_llamas[0], "parameters": {"center": "base"}}
    report = check(own_llamas[1:], **base)
    report.has_only_warning(f"the result will lack tokenizer.json of model {own_llamas[1]}")
    merge(own_llamas[1:], tmp_path / "out", **base)
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_generation_settings_that_somebody_wrote(
    check: Callable[..., Report], own_llamas: list[str], tmp_path: Path
) -> None:
    for folder in own_llamas:
        save_tokenizer(folder, 64)
        (Path(folder) / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    check(own_llamas).is_clean()  # copied with the tokenizer
    report = check(own_llamas, tokenizer={"source": "base"}, base_model=own_llamas[0])
    assert any("the result will lack generation_config.json" in it for it in report.warnings)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    merge(own_llamas[1:], tmp_path / "out", tokenizer_source="union", base_model=own_llamas[0])
    assert not (tmp_path / "out" / "generation_config.json").exists()


@pytest.mark.parametrize(
    ("name", "config", "original", "copied"),
    [("Mistral3", MISTRAL3, True, True), ("Llava", LLAVA, False, False)],
)
def test_processors_of_vision_language_models(
    name: str,
    config: dict[str, Any],
    original: bool,
    copied: bool,
    check: Callable[..., Report],
    tmp_path: Path,
) -> None:
    folders = save_class(tmp_path, f"{name}ForConditionalGeneration", original, **config)
    for folder in folders:
        save_tokenizer(folder, 64)
        for file in ("preprocessor_config.json", "processor_config.json"):
            (Path(folder) / file).write_text("{}")
    report = check(folders)
    if copied:
        report.is_clean()
    else:
        report.has_only_warning("will lack preprocessor_config.json, processor_config.json")
    merge(folders, tmp_path / "out")
    assert (tmp_path / "out" / "preprocessor_config.json").exists() is copied
