"""Masks and tables that old versions of transformers saved: nobody's weights, and not merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from mergekit.options import MergeOptions

from cart_plugin.execution import routes
from cart_plugin.execution.inputs import read_inputs
from tests.doctor.tiny import SIZES, edit_weights, load_tensors, save_class, write_recipe

Merge = Callable[..., Result]
MASK = "gpt_neox.layers.{}.attention.masked_bias"
TRIANGLE = "gpt_neox.layers.{}.attention.bias"


def pythias(folder: Path) -> list[str]:
    """As published: in float16, where a mask's -1e9 is infinite."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].half()
        for layer in range(2):
            tensors[MASK.format(layer)] = torch.tensor(-1e9).half()
            tensors[TRIANGLE.format(layer)] = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
            rotary = f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq"
            tensors[rotary] = torch.rand(4).half()

    models = save_class(folder, "GPTNeoXForCausalLM", **SIZES, max_position_embeddings=16)
    for model in models:
        edit_weights(model, edit)
    return models


@pytest.mark.parametrize(
    "recipe",
    [
        {"merge_method": "cart"},
        {"merge_method": "linear", "parameters": {"weight": 1.0}, "out_dtype": "float32"},
        {"merge_method": "ties", "parameters": {"weight": 1.0, "density": 0.5}, "base_model": 0},
        {"merge_method": "cart", "dtype": "float32", "out_dtype": "float16"},
    ],
)
def test_masks_are_the_first_models(recipe: dict[str, Any], merge: Merge, tmp_path: Path) -> None:
    models = pythias(tmp_path)
    if "base_model" in recipe:
        recipe = {**recipe, "base_model": models[0]}
    done = merge(write_recipe(tmp_path / "r.yaml", models, **recipe), tmp_path / "out")
    assert done.exit_code == 0, done.output
    first, found = load_tensors(models[0]), load_tensors(tmp_path / "out")
    assert found.keys() == first.keys()
    for name in (MASK.format(0), TRIANGLE.format(1)):
        assert found[name].dtype == first[name].dtype
        assert torch.equal(found[name], first[name])
    name = "gpt_neox.layers.1.attention.dense.weight"
    assert not torch.equal(found[name].float(), first[name].float())


def test_masks_of_other_types_are_no_difference(merge: Merge, tmp_path: Path) -> None:
    models = pythias(tmp_path)
    name = TRIANGLE.format(0)
    edit_weights(models[2], lambda tensors: tensors.update({name: tensors[name].byte()}))
    recipe = write_recipe(
        tmp_path / "r.yaml", models, merge_method="linear", parameters={"weight": 1.0}
    )
    done = merge(recipe, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "mergekit stops at 1 integer tensor" in done.output
    assert load_tensors(tmp_path / "out")[name].dtype == torch.bool


@pytest.mark.parametrize("method", ["cart", "linear"])
def test_what_cannot_go_tensor_by_tensor_follows_the_plan(
    method: str, merge: Merge, tmp_path: Path
) -> None:
    models = pythias(tmp_path)
    sources = [
        {"model": model, "layer_range": [0, 2], "parameters": {"weight": 1.0}} for model in models
    ]
    recipe = write_recipe(
        tmp_path / "r.yaml", models, merge_method=method, slices=[{"sources": sources}], models=None
    )
    done = merge(recipe, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "merged by mergekit's plan" in done.output
    assert torch.isneginf(load_tensors(tmp_path / "out")[MASK.format(0)])


def test_a_mask_beyond_float16_is_no_reason_to_refuse(merge: Merge, tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 64}
    models = save_class(tmp_path, "GPT2LMHeadModel", **sizes)
    name = "transformer.h.0.attn.masked_bias"
    for model in models:
        edit_weights(model, lambda tensors: tensors.update({name: torch.tensor(-3.4e38)}))
    recipe = write_recipe(tmp_path / "r.yaml", models, dtype="float32", out_dtype="float16")
    done = merge(recipe, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "infinite" not in done.output


def test_an_infinite_weight_is_not_taken_for_a_mask(merge: Merge, tmp_path: Path) -> None:
    models = pythias(tmp_path)
    name = "gpt_neox.layers.0.attention.dense.bias"
    for model in models:
        edit_weights(model, lambda tensors: tensors[name].fill_(float("-inf")))
    done = merge(write_recipe(tmp_path / "r.yaml", models), tmp_path / "out")
    assert done.exit_code == 1
    assert name in done.output.splitlines()[-1]


def test_cart_on_mergekits_plan_takes_a_mask_as_it_is(tmp_path: Path) -> None:
    models = pythias(tmp_path)
    inputs = read_inputs({"merge_method": "cart", "models": [{"model": model} for model in models]})
    options = MergeOptions(quiet=True)
    job = routes.Job.of(routes.Choice(routes.PLAN, ""), inputs, tmp_path / "out", options)
    routes.by_plan(job, options)
    assert torch.isneginf(load_tensors(tmp_path / "out")[MASK.format(0)])


def test_a_mask_that_the_plan_makes_infinite_is_no_loss(merge: Merge, tmp_path: Path) -> None:
    models = pythias(tmp_path)
    for model in models:
        edit_weights(
            model,
            lambda tensors: tensors.update(
                {name: tensor.float().clamp(-1e9) for name, tensor in tensors.items()}
            ),
        )
    sources = [{"model": model, "layer_range": [0, 2]} for model in models]
    recipe = write_recipe(
        tmp_path / "r.yaml", models, slices=[{"sources": sources}], models=None, out_dtype="float16"
    )
    done = merge(recipe, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert torch.isneginf(load_tensors(tmp_path / "out")[MASK.format(0)])
