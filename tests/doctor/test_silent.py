"""What doctor says about merges that would end well and give a wrong model."""

from __future__ import annotations

import json
import os
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
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.doctor.conftest import Report
from tests.doctor.gpt2 import save_gpt2
from tests.doctor.tiny import change_config, edit_weights, load_tensors, save_model, save_models

# A base without the head of the fine-tuned models


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three GPT-2 with a classifier and one bare."""
    folder = tmp_path_factory.mktemp("gpt2")
    tuned = [
        save_gpt2(folder / f"tuned-{seed}", "GPT2ForSequenceClassification", seed)
        for seed in range(3)
    ]
    return [*tuned, save_gpt2(folder / "bare", "GPT2Model", 3)]


@pytest.mark.parametrize("method", ["cart", "task_arithmetic"])
def test_a_bare_base(
    method: str, classifiers: list[str], check: Callable[..., Report], tmp_path: Path
) -> None:
    *tuned, bare = classifiers
    recipe = {"merge_method": method, "base_model": bare, "parameters": {"weight": 0.3}}
    report = check(tuned, **recipe)
    report.has_only_problem(f"by the names of {bare}", f"result would be {bare} alone", "leave")
    assert "plain average" not in report.text
    check(tuned).is_clean()
    if method != "cart":  # which refuses; and so it is
        config = {**recipe, "models": [{"model": model} for model in tuned]}
        options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
        run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "out"), options)
        merged, base = load_tensors(tmp_path / "out"), load_tensors(bare)
        assert all(torch.equal(merged[name], tensor) for name, tensor in base.items())


def test_a_head_that_one_model_lacks_is_none_of_it(
    classifiers: list[str], check: Callable[..., Report], tmp_path: Path
) -> None:
    lacking = shutil.copytree(classifiers[0], tmp_path / "lacking").as_posix()
    edit_weights(lacking, lambda tensors: tensors.pop("score.weight"))
    report = check([lacking, *classifiers[1:3]])
    assert "by the names of" not in report.text


# One folder under two paths


@pytest.mark.parametrize("spelling", ["{}/", "{}/../{name}", "link"])
def test_one_folder_under_two_paths(
    spelling: str, check: Callable[..., Report], own_llamas: list[str], tmp_path: Path
) -> None:
    first = own_llamas[0]
    os.symlink(first, tmp_path / "link")
    other = spelling.format(first, name=Path(first).name).replace("link", str(tmp_path / "link"))
    report = check([*own_llamas, other])
    report.has_only_problem("are one folder: the model would count twice", first, other)
    report = check([other, *own_llamas[1:]], base_model=first)
    report.has_only_problem("the base would be merged", "write its path alike")


def test_the_one_model_without_a_weight(
    check: Callable[..., Report], own_llamas: list[str]
) -> None:
    base, *others = own_llamas
    entries: list[Any] = [{"model": model, "parameters": {"weight": 0.4}} for model in others]
    report = check([], models=[{"model": base}, *entries])
    report.has_only_warning(f"{base} has no weight", "counts 1.0", "base_model")
    check([], models=[{"model": base}, *entries[:1], {"model": others[1]}]).is_clean()


# Tokens


def add_tokenizer(folder: str, *added: str) -> None:
    """Give a model a tokenizer of three words and some tokens of its own."""
    words = {"<unk>": 0, "a": 1, "b": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.add_tokens(list(added))
    fast.save_pretrained(folder)


def test_different_tokens_at_the_same_ids(
    check: Callable[..., Report], own_llamas: list[str]
) -> None:
    for number, folder in enumerate(own_llamas):
        add_tokenizer(folder, f"<x{number}>", "<same>")
    report = check(own_llamas)
    report.has_only_problem(
        f"3 is '<x0>' in {own_llamas[0]}, '<x1>' in {own_llamas[1]}", "tokenizer: {source: union}"
    )
    check(own_llamas, tokenizer={"source": "union"}).is_clean()


def test_tokens_that_a_model_lacks(check: Callable[..., Report], own_llamas: list[str]) -> None:
    for folder, added in zip(own_llamas, (["<x>"], [], ["<x>"]), strict=True):
        add_tokenizer(folder, *added)
    report = check(own_llamas)
    report.has_only_warning(f"nothing in {own_llamas[1]}", "3 is '<x>'", "union")


def test_equal_tokens_in_other_files_are_no_difference(
    check: Callable[..., Report], own_llamas: list[str]
) -> None:
    for folder in own_llamas:
        add_tokenizer(folder, "<x>")
    words = {"<unk>": 0, "a": 1, "b": 2}
    old = Path(own_llamas[1])
    (old / "tokenizer.json").unlink()
    (old / "vocab.json").write_text(json.dumps(words))
    (old / "added_tokens.json").write_text(json.dumps({"<x>": 3}))
    report = check(own_llamas)
    assert report.problems == []
    assert "tokens are not in all" not in report.text


def test_a_tokenizer_that_cannot_be_read(
    check: Callable[..., Report], own_llamas: list[str]
) -> None:
    for folder in own_llamas:
        add_tokenizer(folder)
    (Path(own_llamas[1]) / "tokenizer.json").write_text("[")
    check(own_llamas).is_clean()


# Configs


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
    ],
    ids=repr,
)
def test_configs_that_use_equal_weights_differently(
    changes: dict[str, Any], check: Callable[..., Report], own_llamas: list[str]
) -> None:
    change_config(own_llamas[1], **changes)
    report = check(own_llamas)
    key = next(iter(changes))
    report.has_only_problem("use equal weights differently", own_llamas[1], "correct it")
    assert key in report.text or "head" in report.text


def test_tied_and_untied_models(check: Callable[..., Report], own_llamas: list[str]) -> None:
    change_config(own_llamas[1], tie_word_embeddings=True)
    check(own_llamas).has_only_problem("tie_word_embeddings is False in", "True in")


def test_records_in_configs_are_no_difference(
    check: Callable[..., Report], own_llamas: list[str]
) -> None:
    change_config(
        own_llamas[1],
        _name_or_path="me/tuned",
        transformers_version="4.0.0",
        attention_dropout=0.5,
        use_cache=False,
        initializer_range=0.1,
        eos_token_id=7,
        id2label={"0": "good", "1": "bad"},
        label2id={"good": 0, "bad": 1},
        unsloth_fixed=True,
    )
    check(own_llamas).is_clean()


def test_an_unknown_difference_is_a_warning(
    check: Callable[..., Report], own_llamas: list[str]
) -> None:
    change_config(own_llamas[1], max_position_embeddings=77)
    check(own_llamas).has_only_warning("configs differ: max_position_embeddings is", "77 in")


# Casts that no method sees


@pytest.mark.parametrize("dtype", ["float32", None])
def test_float16_after_a_merge_in_float32(
    dtype: str | None, check: Callable[..., Report], own_llamas: list[str]
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    recipe = {"dtype": dtype, "out_dtype": "float16"}
    check(own_llamas, **recipe).is_clean()
    edit_weights(own_llamas[1], lambda tensors: tensors[name][0].fill_(-60_000.0))
    report = check(own_llamas, **recipe)
    report.has_only_warning("beyond 65,504", "infinite", f"up to 60,000 in {name}", "bfloat16")
    edit_weights(own_llamas[1], lambda tensors: tensors[name][0].fill_(70_000.0))
    report = check(own_llamas, **recipe)
    report.has_only_problem(name, "up to 70,000", "infinite", "out_dtype: bfloat16")
    check(own_llamas, out_dtype="bfloat16").is_clean()


@pytest.mark.parametrize("method", ["cart", "linear"])
def test_inputs_beyond_the_dtype_that_they_are_read_as(
    method: str, check: Callable[..., Report], own_llamas: list[str]
) -> None:
    recipe = {"merge_method": method, "parameters": {"weight": 1.0}, "dtype": "float16"}
    check(own_llamas, **recipe).is_clean()
    edit_weights(own_llamas[1], lambda tensors: tensors["model.norm.weight"][0].fill_(70_000.0))
    for out_dtype in (None, "float16", "float32"):
        report = check(own_llamas, **recipe, out_dtype=out_dtype)
        report.has_only_problem("dtype: model.norm.weight", "up to 70,000", "bfloat16")


def test_a_way_out_of_infinity_for_methods_that_do_not_look(
    check: Callable[..., Report], own_llamas: list[str]
) -> None:
    edit_weights(own_llamas[1], lambda tensors: tensors["model.norm.weight"][0].fill_(60_000.0))
    report = check(
        own_llamas, merge_method="linear", parameters={"weight": 1.0}, out_dtype="float16"
    )
    report.has_only_warning("up to 60,000", "mergekit-cart merge RECIPE OUT")
    assert "dtype: float16`" not in report.text


@pytest.mark.parametrize("new", [True, False])
def test_values_of_pickles(new: bool, check: Callable[..., Report], tmp_path: Path) -> None:
    folders = save_models(tmp_path, "llama")
    whole = load_tensors(folders[0])
    whole["model.norm.weight"][0] = 70_000.0
    file = Path(folders[0]) / "pytorch_model.bin"
    torch.save(whole, file, _use_new_zipfile_serialization=new)
    (Path(folders[0]) / "model.safetensors").unlink()
    report = check(folders, out_dtype="float16", dtype="float32")
    if new:
        report.has_only_problem("model.norm.weight", "up to 70,000")
    else:  # they would be loaded whole
        assert f"the inputs' are not known of {folders[0]}" in report.text


# Weights that nothing can be divided by


def of_head(*weights: float) -> list[Any]:
    """Weights for `lm_head`, by model; 1 elsewhere."""
    return [[{"filter": "lm_head", "value": weight}, {"value": 1.0}] for weight in weights]


@pytest.mark.parametrize("weights", [(0.0, 0.0, 0.0), (0.1, 0.2, -0.3), (1.0, 0.0, 0.0)])
@pytest.mark.parametrize(
    ("method", "switch"),
    [("linear", "normalize"), ("multislerp", "normalize_weights"), ("ties", "normalize")],
)
def test_weights_of_zero_where_mergekit_divides_by_their_sum(
    method: str, switch: str, weights: tuple[float, ...], check: Callable[..., Report],
    llamas: list[str], tmp_path: Path,
) -> None:  # fmt: skip
    weighted = [
        {"model": model, "parameters": {"weight": weight}}
        for model, weight in zip(llamas, of_head(*weights), strict=True)
    ]
    recipe: dict[str, Any] = {"models": weighted, "merge_method": method}
    if method == "ties":
        recipe["base_model"] = str(save_model(tmp_path / "base", "llama", 9))
    report = check([], **recipe)
    options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False)
    run_merge(MergeConfiguration.model_validate(recipe), str(tmp_path / "out"), options)
    head = load_tensors(tmp_path / "out")["lm_head.weight"]
    is_whole = bool(head.isfinite().all()) and float(head.abs().max()) < 1e3
    assert is_whole == (weights[0] == 1.0 or method == "ties")
    if is_whole:
        report.is_clean()
        return
    report.has_only_problem("sum to 0 for 1 tensor (lm_head.weight)", f"{method} divides by")
    if method == "linear":
        check([], **recipe, parameters={switch: False}).is_clean()


# Masks and tables


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32])
def test_causal_masks_of_old_checkpoints(
    dtype: torch.dtype, check: Callable[..., Report], tmp_path: Path
) -> None:
    folders = [save_gpt2(tmp_path / str(seed), "GPT2LMHeadModel", seed) for seed in range(3)]

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            mask = torch.ones(1, 1, 16, 16).tril().to(dtype)
            tensors[f"transformer.h.{layer}.attn.bias"] = mask
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    for folder in folders:
        edit_weights(folder, add)
    check(folders).is_clean()


def test_index_tables_of_integers(check: Callable[..., Report], tmp_path: Path) -> None:
    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        config = transformers.SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
        )
        transformers.SwinForImageClassification(config).save_pretrained(tmp_path / str(seed))
        folders.append(str(tmp_path / str(seed)))
    assert "weights cannot be merged" not in check(folders).text
    report = check(folders, dtype="bfloat16")
    assert "weights cannot be merged" not in report.text


def packed(kind: str, tensors: dict[str, torch.Tensor]) -> None:
    """Store a matrix as a quantising tool does."""
    name = "model.layers.0.mlp.up_proj.weight"
    weight = tensors.pop(name)
    codes = torch.ones(weight.numel() // 2, 1, dtype=torch.uint8)
    stored = {
        "bnb4": {name: codes},
        "gptq": {name.replace("weight", "qweight"): torch.ones(4, 64, dtype=torch.int32)},
        "mxfp4": {name + "_blocks": codes},
    }
    tensors.update(stored[kind])


@pytest.mark.parametrize("kind", ["bnb4", "gptq", "mxfp4"])
def test_packed_weights(kind: str, check: Callable[..., Report], own_llamas: list[str]) -> None:
    edit_weights(own_llamas[1], lambda tensors: packed(kind, tensors))
    check(own_llamas).has_only_problem(f"model {own_llamas[1]} holds", "quantised", "dequantise")


# Slices


def test_a_slice_of_one_model(check: Callable[..., Report], llamas: list[str]) -> None:
    together = {"sources": [{"model": model, "layer_range": [0, 3]} for model in llamas]}
    alone = {"sources": [{"model": llamas[0], "layer_range": [3, 5]}]}
    check([], models=None, slices=[together, alone]).is_clean()
    report = check([], models=None, slices=[alone])
    assert "cart needs at least two" in report.problems[0]


@pytest.mark.parametrize("method", ["cart", "linear"])
def test_a_first_slice_of_fewer_models_than_the_last(
    method: str, check: Callable[..., Report], llamas: list[str]
) -> None:
    alone = {"sources": [{"model": llamas[0], "layer_range": [0, 2]}]}
    together = {"sources": [{"model": model, "layer_range": [2, 5]} for model in llamas]}
    parameters = {"weight": 1} if method == "linear" else {}
    report = check(
        [], models=None, slices=[alone, together], merge_method=method, parameters=parameters
    )
    report.has_only_problem(
        "the last slice has 3 sources and the first one 1",
        f"(the last norm, the head) of {llamas[0]}",
    )


def test_configs_of_models_that_mergekit_cannot_plan(
    check: Callable[..., Report], saved: Callable[..., list[str]], tmp_path: Path
) -> None:
    other = str(shutil.copytree(saved("bert")[2], tmp_path / "other"))
    change_config(other, num_attention_heads=2)
    report = check([*saved("bert")[:2], other])
    plan, configs = report.problems
    assert "cannot plan" in plan
    assert f"num_attention_heads is 4 in {saved('bert')[0]} and 1 more, 2 in {other}" in configs
