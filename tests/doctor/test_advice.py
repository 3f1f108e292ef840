"""Ways out that doctor names: the right one for each case, and only where it leads out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.doctor.conftest import Report
from tests.doctor.tiny import MISTRAL3, SIZES, save_class, save_model, save_models, save_tokenizer
from tests.mergekit.helpers import fails

_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("T5ForConditionalGeneration", _T5),
        ("GPTNeoXForCausalLM", SIZES),
        ("FalconForCausalLM", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}),
    ],
)
def test_models_with_a_head_are_not_told_to_get_one(
    name: str, config: dict[str, Any], check: Callable[..., Report], tmp_path: Path
) -> None:
    if name.startswith("Falcon"):
        config = {**config, "num_attention_heads": 4, "multi_query": True, "parallel_attn": True}
    report = check(save_class(tmp_path, name, **config))
    report.has_only_problem("that mergekit requires of this architecture", "mergekit-cart merge")
    assert "head (" not in report.text
    assert "save_pretrained" not in report.text  # neither format helps


def test_bare_models_are(check: Callable[..., Report], saved: Callable[..., list[str]]) -> None:
    check(saved("roberta")).has_only_problem("save the models with their head (the `...For...`")


@pytest.mark.parametrize("original", [True, False])
def test_the_other_format_where_it_helps(
    original: bool, check: Callable[..., Report], tmp_path: Path
) -> None:
    models = save_class(tmp_path, "Mistral3ForConditionalGeneration", original, **MISTRAL3)
    report = check(models)
    if original:
        assert report.problems == []
        return
    report.has_only_problem("requires of this architecture", "save_original_format=True")


def test_slices_of_several_stacks(check: Callable[..., Report], tmp_path: Path) -> None:
    models = save_class(tmp_path, "T5ForConditionalGeneration", **_T5)
    sources = [{"model": model, "layer_range": [0, 2]} for model in models]
    report = check([], models=None, slices=[{"sources": sources}])
    report.has_only_problem(
        "must use modules", "several stacks of layers (", "decoder: {slices: [...]}", "`models:`"
    )


# Only the base is of another class


@pytest.mark.parametrize("needed", [False, True])
def test_a_base_of_another_class_can_go(
    needed: bool, check: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    kind = transformers.LlamaForSequenceClassification
    models = [str(tmp_path / f"classifier-{number}") for number in range(3)]
    for model in models:
        kind.from_pretrained(llamas[0]).save_pretrained(model)
    parameters = {"center": "base"} if needed else {}
    report = check(models, base_model=llamas[0], parameters=parameters)
    advice = "name one of the models' own class" if needed else "leave `base_model` out"
    report.has_only_problem("cannot plan", "only the base model is a 'LlamaForCausalLM'", advice)
    assert check(models).problems == []
    report = check(models[:2], base_model=llamas[0], merge_method="cart_auto")
    report.has_only_problem("cannot plan", "save it with the models' own class", "their average")


# Signs in names


@pytest.mark.parametrize(
    ("name", "sign"), [("a+b", "between a model and its adapter"), ("m@v2", "before a revision")]
)
@pytest.mark.parametrize("as_base", [False, True])
def test_signs_that_split_a_path(
    name: str,
    sign: str,
    as_base: bool,
    check: Callable[..., Report],
    own_llamas: list[str],
    tmp_path: Path,
) -> None:
    folder = str(Path(own_llamas[2]).rename(tmp_path / name))
    models = own_llamas[:2] if as_base else [*own_llamas[:2], folder]
    parameters = {"center": "base"} if as_base else {}
    base = {"base_model": folder, "parameters": parameters} if as_base else {}
    report = check(models, **base)
    report.has_only_problem(f"{folder} is a folder, but", sign, "`model: {model: {path: ")

    mapping = {"model": {"path": folder}}
    if as_base:
        check(models, base_model=mapping, parameters=parameters).is_clean()
    else:
        entries = [{"model": model} for model in [*own_llamas[:2], mapping]]
        check([], models=entries).is_clean()


def test_more_signs_than_a_path_can_have(check: Callable[..., Report], llamas: list[str]) -> None:
    for path in ("/x/a+b/c+d", "/x/a@b@c"):
        check([*llamas[:2], path]).has_only_problem("mergekit rejects", "{model: {path: ")


# Layers, sizes and names


@pytest.mark.parametrize(
    ("layers", "parts"),
    [
        ([0, 9], ("goes beyond model", "has 5 layers", "let it end at 5")),
        ([5, 6], ("goes beyond model", "has 5 layers")),
        ([3, 1], ("names no layer", "[FIRST, LAST + 1]")),
        ([-1, 2], ("names no layer",)),
    ],
)
def test_layers_that_a_model_does_not_have(
    layers: list[int], parts: tuple[str, ...], check: Callable[..., Report], llamas: list[str]
) -> None:
    sources = [{"model": model, "layer_range": [0, 5]} for model in llamas[:2]]
    sources.append({"model": llamas[2], "layer_range": layers})
    report = check([], models=None, slices=[{"sources": sources}])
    report.has_only_problem(f"slices[0].sources[2].layer_range {layers}", *parts)
    assert "head" not in report.text


def test_a_wider_model_gets_no_advice_on_tokenizers(
    check: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    wide = str(save_model(tmp_path / "wide", "llama", 9, hidden_size=64, vocab_size=70))
    report = check([*llamas[:2], wide])
    report.has_only_problem("the shapes of", "merge models of one architecture and size")
    assert "tokenizer" not in report.problems[0]


@pytest.mark.parametrize("name", ["CART_AUTO", "Cart_Auto", "cart-auto"])
def test_methods_in_capitals(name: str, check: Callable[..., Report], llamas: list[str]) -> None:
    check(llamas, merge_method=name).has_only_problem(name, "did you mean cart_auto?")


def test_tensors_are_counted_once(check: Callable[..., Report], tmp_path: Path) -> None:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**SIZES, "num_key_value_heads": 2, "rope_parameters": rope}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4}
    vision |= {"out_hidden_size": 32, "patch_size": 4, "fullatt_block_indexes": [1]}
    models = save_class(
        tmp_path,
        "Qwen2_5_VLForConditionalGeneration",
        text_config=text,
        vision_config=vision,
        **dict(zip(("image_token_id", "video_token_id"), (60, 61), strict=True)),
    )
    assert "  ok       57 tensors: " in check(models).text


def test_a_wider_vocabulary_still_does(check: Callable[..., Report], tmp_path: Path) -> None:
    models = save_models(tmp_path, "llama", 2)
    other = str(save_model(tmp_path / "other", "llama", 9, vocab_size=70))
    check([*models, other]).has_only_problem("tokenizer: {source: union}")


def test_layers_whose_embeddings_mergekit_drops(
    check: Callable[..., Report], tmp_path: Path
) -> None:
    models = save_class(
        tmp_path, "T5ForConditionalGeneration", **_T5, feed_forward_proj="gated-gelu"
    )
    slices = [{"sources": [{"model": model, "layer_range": [0, 2]} for model in models]}]
    modules: dict[str, Any] = {part: {"slices": slices} for part in ("encoder", "decoder")}
    report = check([], models=None, modules=modules)
    report.has_only_problem("drop 1 of 51", "leaves out shared", "(`shared: {models: [...]}`)")
    assert "save_original_format" not in report.text  # T5 has one format
    modules["shared"] = {"models": [{"model": model} for model in models]}
    check([], models=None, modules=modules).is_clean()


def test_tokenizer_settings_are_in_the_way_of_another_way(
    check: Callable[..., Report], tmp_path: Path
) -> None:
    models = save_models(tmp_path, "bert")
    for model in models:
        save_tokenizer(model, 64)
    report = check(models, tokenizer={"source": "union"})
    report.has_only_problem("cannot plan", "or delete the tokenizer settings and merge with")


def test_models_of_one_class_in_two_formats(
    check: Callable[..., Report], saved: Callable[..., list[str]], tmp_path: Path
) -> None:
    mixed = [saved("vit")[0], *saved("vit", original_format=False)[1:]]
    check(mixed).has_only_problem("by the names of", "in one format", "or merge with")
    fails(tmp_path, mixed, "by the names of")


@pytest.mark.parametrize("name", ["Dinov2Model", "Mistral3ForConditionalGeneration"])
def test_models_that_hold_the_most_by_names_of_the_other_format(
    name: str, check: Callable[..., Report], tmp_path: Path
) -> None:
    config: dict[str, Any] = MISTRAL3
    if name == "Dinov2Model":
        config = {**SIZES, "image_size": 32, "patch_size": 16}
    for folder, original in (("original", True), ("todays", False)):
        (tmp_path / folder).mkdir()
        save_class(tmp_path / folder, name, original, **config)
    folders = ["original", "original", "todays"]
    mixed = [str(tmp_path / folder / f"{name}-{n}") for n, folder in enumerate(folders)]
    report = check(mixed, merge_method="linear", parameters={"weight": 1.0})
    report.has_only_problem("are saved in two formats", "in one format", "or merge with")
    assert report.warnings == []


def test_a_recipe_of_one_tower_leaves_out_the_others(
    check: Callable[..., Report], tmp_path: Path
) -> None:
    models = save_class(tmp_path, "Mistral3ForConditionalGeneration", **MISTRAL3)
    entries = [{"model": model} for model in models]
    report = check([], models=None, modules={"text_decoder": {"models": entries}})
    report.has_only_problem("would silently drop", "leaves out multi_modal_projector, vision_tower")
    assert "names them differently" not in report.text
