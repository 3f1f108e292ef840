"""What is checked before a merge tensor by tensor, as it is before mergekit's plan is followed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from mergekit.options import MergeOptions

from cart_plugin.errors import CartError
from cart_plugin.execution import routes
from cart_plugin.execution.inputs import read_inputs
from cart_plugin.execution.settings import TensorName
from tests.doctor.tiny import (
    change_config,
    load_tensors,
    save_class,
    save_tokenizer,
    write_recipe,
)
from tests.execution.test_command import refuses

Merge = Callable[..., Result]
Saved = Callable[..., list[str]]
NEOX = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SCALED: Any = {"filter": "query", "value": 2}


def own(models: list[str], folder: Path) -> list[str]:
    """Models that a test may break."""
    return [str(shutil.copytree(model, folder / f"m{n}")) for n, model in enumerate(models)]


def choose(recipe: Path, **options: Any) -> routes.Choice:
    return routes.choose(read_inputs(yaml.safe_load(recipe.read_text())), MergeOptions(), **options)


# What mergekit cannot plan, loses tensors of, and wants tensors of that nobody has.
@pytest.mark.parametrize("architecture", ["bert", "vit", "gpt-neox"])
def test_configs_are_compared_whatever_the_route(
    architecture: str, merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    if architecture == "gpt-neox":
        models = save_class(tmp_path, "GPTNeoXForCausalLM", **NEOX, num_attention_heads=4)
    else:
        models = own(saved(architecture), tmp_path)
    change_config(models[2], num_attention_heads=2)
    recipe = write_recipe(tmp_path / "r.yaml", models)
    refuses(merge(recipe, tmp_path / "out"), "not merged", "num_attention_heads is 4 in")
    with pytest.raises(CartError, match="num_attention_heads is 4 in"):
        choose(recipe)
    assert choose(recipe, force=True).route == routes.TENSORWISE


def test_tokens_are_compared_where_nothing_aligns_them(
    merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    models = own(saved("bert"), tmp_path)
    for number, model in enumerate(models):
        # The last ones are beyond the embedding's 64 rows.
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(59))]
        beyond = [f"x{number}"]
        (Path(model) / "vocab.txt").write_text("\n".join([*words, *beyond]) + "\n")
    recipe = write_recipe(tmp_path / "r.yaml", models)
    assert merge(recipe, tmp_path / "out").exit_code == 0
    file = Path(models[2], "vocab.txt")
    file.write_text(file.read_text().replace("w9", "other"))
    done = merge(recipe, tmp_path / "other")
    refuses(done, "not merged", "different tokens at the same ids", "'other'")
    assert "merge models of one tokenizer" in done.output


@pytest.mark.parametrize(
    ("recipe", "fact"),
    [
        ({"parameters": {"rank": [SCALED], "rank_ratio": 0.1}}, "both hold for 4 tensors"),
        ({"parameters": {"weight": 0.0}}, "the models' weights sum to 0 or less"),
    ],
    ids=["rank rules", "weights"],
)
def test_parameters_are_checked_for_each_tensor(
    recipe: dict[str, Any], fact: str, merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    file = write_recipe(tmp_path / "r.yaml", saved("bert"), **recipe)
    refuses(merge(file, tmp_path / "out"), "not merged", fact)
    with pytest.raises(CartError, match=fact):
        choose(file)


def test_what_the_parameters_do_is_summed_up(merge: Merge, saved: Saved, tmp_path: Path) -> None:
    done = merge(write_recipe(tmp_path / "r.yaml", saved("bert")), tmp_path / "out")
    assert "39 tensors: 13 decomposed, 26 averaged" in done.output


@pytest.mark.parametrize("text", ["attention.attention.query", "attention.q_proj"])
def test_filters_find_the_files_names_and_the_models(
    text: str, merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    models = saved("vit")
    weights = [[{"filter": text, "value": value}, {"value": 1.0}] for value in (1.0, 0.0, 0.0)]
    entries = [
        {"model": model, "parameters": {"weight": weight}}
        for model, weight in zip(models, weights, strict=True)
    ]
    recipe = write_recipe(tmp_path / "r.yaml", [], models=entries, merge_method="linear")
    done = merge(recipe, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "the filter" not in done.output
    first, merged = load_tensors(models[0]), load_tensors(tmp_path / "out")
    for name, tensor in merged.items():
        assert torch.equal(tensor, first[name]) == ("attention.query." in name), name


def test_a_filter_that_finds_nothing_is_reported(
    merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    parameters = {"rank_ratio": [{"filter": "nosuchname", "value": 0.5}, {"value": 0.1}]}
    for architecture in ("vit", "bert"):
        recipe = write_recipe(tmp_path / "r.yaml", saved(architecture), parameters=parameters)
        done = merge(recipe, tmp_path / architecture)
        assert done.exit_code == 0
        assert done.output.count("the filter nosuchname matches no tensor") == 1


def test_a_filter_has_to_mean_all_parts_of_a_tensor() -> None:
    parts = tuple(f"model.layers.0.block.experts.{n}.{w}" for n in range(2) for w in ("w1", "w3"))
    name = TensorName("model.layers.0.mlp.experts.gate_up_proj", [parts])
    assert all(text in name for text in ("mlp.experts", "block.experts", "gate_up", "layers.0"))
    assert not any(text in name for text in ("experts.1.", "w3", "mlp.block"))


@pytest.mark.parametrize(
    ("recipe", "advice"),
    [
        ({"merge_method": "slerp", "parameters": {"t": 0.5}}, "correct what the message names"),
        ({"merge_method": "linear"}, "set `weight` under the recipe's `parameters:`, or for each"),
        ({"tokenizer": {"source": "base"}}, "with a head (BertForSequenceClassification)"),
        ({"tokenizer": {"source": "base"}}, "or delete the tokenizer settings and merge with"),
    ],
    ids=str,
)
def test_advice_leads_to_no_dead_end(
    recipe: dict[str, Any], advice: str, merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    models = saved("bert")
    if "tokenizer" in recipe:  # which all of them need
        copies = [str(tmp_path / str(number)) for number in range(len(models))]
        for model, copy in zip(models, copies, strict=True):
            save_tokenizer(str(shutil.copytree(model, copy)), 64)
        models = copies
    if recipe.get("merge_method") == "slerp":
        recipe = {**recipe, "base_model": models[0]}
    done = merge(write_recipe(tmp_path / "r.yaml", models, **recipe), tmp_path / "out")
    refuses(done, "not merged: mergekit cannot plan")
    assert advice in done.output
    assert "merged tensor by tensor instead" not in done.output
    assert "; or merge with `mergekit-cart merge" not in done.output


@pytest.mark.parametrize("base", [False, True])
def test_models_of_one_class_in_two_formats(
    base: bool, merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    original, todays = saved("vit"), saved("vit", original_format=False)
    mixed = [original[0], *todays[1:]]
    for name, models in (("same", original), ("mixed", mixed)):
        first, *others = models
        settings = {"base_model": first} if base else {}
        file = write_recipe(tmp_path / "r.yaml", others if base else models, **settings)
        done = merge(file, tmp_path / name)
        assert done.exit_code == 0, done.output
    assert "merged tensor by tensor: mod" in done.output
    same, merged = load_tensors(tmp_path / "same"), load_tensors(tmp_path / "mixed")
    assert same.keys() == merged.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in same.items())


def test_one_folder_under_two_paths_counts_once_tensor_by_tensor_too(
    merge: Merge, saved: Saved, tmp_path: Path
) -> None:
    models = saved("bert")
    recipe = write_recipe(tmp_path / "r.yaml", [*models, f"{models[0]}/"])
    refuses(merge(recipe, tmp_path / "out", "--force"), "tensor by tensor: ", "are one folder")
