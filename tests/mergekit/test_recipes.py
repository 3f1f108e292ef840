"""Recipes: which parameters reach which tensor, on tiny checkpoints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cart_plugin import CartSettings, merge_tensors
from cart_plugin.errors import CartWarning
from tests.doctor.tiny import load_tensors
from tests.mergekit.helpers import DOWN, KEY, QUERY, TABLES, Tensors, edit, is_average, is_cart
from tests.support import cart_formula, relative_error


def test_matrices_are_decomposed_and_everything_else_is_averaged(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    merged = merge(llamas)
    assert merged.keys() == inputs[0].keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        decomposed = tensor.ndim == 2 and name not in TABLES
        k = math.floor(0.08 * min(tensor.shape)) if decomposed else 0
        assert is_cart(merged, inputs, name, k), name
        assert is_average(merged, inputs, name) != decomposed, name


def test_filters_choose_by_tensor_name(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    merged = merge(
        llamas,
        parameters={
            "rank_ratio": [
                {"filter": "self_attn", "value": 0.25},
                {"filter": "down_proj", "value": 0.0},
                {"value": 0.5},
            ],
            "lambda": [{"filter": "q_proj", "value": 2.0}, {"value": 0.5}],
        },
    )
    assert is_cart(merged, inputs, QUERY.format(1), 8, scale=2.0)
    assert is_cart(merged, inputs, KEY.format(1), 4, scale=0.5)
    assert is_average(merged, inputs, DOWN.format(1))
    assert is_cart(merged, inputs, "model.layers.1.mlp.up_proj.weight", 16, scale=0.5)


def test_rank_rules_may_differ_between_tensors(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    merged = merge(
        llamas,
        parameters={
            "rank": [{"filter": "q_proj", "value": 3}],
            "energy": [{"filter": "k_proj", "value": 1.0}],
        },
    )
    assert is_cart(merged, inputs, QUERY.format(1), 3)
    assert is_average(merged, inputs, KEY.format(1))
    assert is_cart(merged, inputs, DOWN.format(1), 2)


def test_gradients_change_from_layer_to_layer(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    weighted = [{"model": llamas[0], "parameters": {"weight": [1.0, 3.0]}}, *llamas[1:4]]
    merged = merge(
        weighted,
        parameters={"rank": [0, 7], "lambda": [1.0, 2.0], "svd": "exact"},
    )
    # Layer 2 of 5 has the rank 3.5, which is cut to 3.
    for layer, k in enumerate([0, 1, 3, 5, 7]):
        weights = [1.0 + layer / 2, 1.0, 1.0, 1.0]
        scale = 1.0 + layer / 4
        name = QUERY.format(layer)
        assert is_cart(merged, inputs[:4], name, k, scale=scale, weights=weights), layer


def test_gradient_of_rank_ratio(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    merged = merge(llamas, parameters={"rank_ratio": [0.0, 0.25, 0.0]})
    for layer, k in enumerate([0, 4, 8, 4, 0]):
        assert is_cart(merged, inputs, QUERY.format(layer), k), layer


def test_weights_belong_to_models(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    weights = [1.0, 0.2, 2.0]
    models = [
        {"model": model, "parameters": {"weight": weight}}
        for model, weight in zip(llamas, weights, strict=False)
    ]
    merged = merge(models)
    assert is_cart(merged, inputs[:3], QUERY.format(0), 2, weights=weights)
    assert is_average(merged, inputs[:3], "lm_head.weight", weights)


def test_slices_take_layers_from_where_they_say(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    def sources(first: int, last: int) -> list[dict[str, Any]]:
        return [{"model": model, "layer_range": [first, last]} for model in llamas[:3]]

    shifted = sources(1, 2)
    shifted[2]["layer_range"] = [3, 4]
    merged = merge(
        None,
        slices=[
            {"sources": sources(0, 2), "parameters": {"rank": 4}},
            {"sources": shifted, "parameters": {"rank": 1, "lambda": 3.0}},
        ],
    )
    assert is_cart(merged, inputs[:3], QUERY.format(1), 4)
    tensors = [inputs[i][QUERY.format(layer)] for i, layer in ((0, 1), (1, 1), (2, 3))]
    expected = cart_formula(tensors, 1, scale=3.0)
    assert relative_error(merged[QUERY.format(2)], expected) <= 1e-5
    assert QUERY.format(3) not in merged


def test_dtype_and_out_dtype(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    brain = merge(llamas, dtype="bfloat16")
    assert {tensor.dtype for tensor in brain.values()} == {torch.bfloat16}
    assert is_cart(brain, inputs, QUERY.format(1), 2)
    cast = merge(llamas, dtype="float32", out_dtype="bfloat16")
    exact = merge(llamas)
    for name, tensor in exact.items():
        assert torch.equal(cast[name], tensor.to(torch.bfloat16))


def test_half_precision_checkpoints_stay_so(merge: Callable[..., Tensors], own: list[str]) -> None:
    for folder in own:
        edit(folder, lambda tensors: {k: v.to(torch.float16) for k, v in tensors.items()})
    merged = merge(own)
    assert {tensor.dtype for tensor in merged.values()} == {torch.float16}
    halves = [load_tensors(folder) for folder in own]
    assert is_cart(merged, halves, QUERY.format(0), 2)


def test_a_base_that_is_given_but_not_used_changes_nothing(
    merge: Callable[..., Tensors], llamas: list[str]
) -> None:
    without = merge(llamas[:4])
    implicit = merge(llamas[:4], base_model=llamas[4])
    listed = merge([llamas[4], *llamas[:4]], base_model=llamas[4])
    for name, tensor in without.items():
        assert torch.equal(implicit[name], tensor), name
        assert torch.equal(listed[name], tensor), name


def test_center_base_starts_at_the_base_and_averages_the_rest(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    parameters = {"center": "base", "rank": 4, "lambda": 0.3}
    merged = merge(llamas[:3], base_model=llamas[4], parameters=parameters)
    name = DOWN.format(2)
    assert is_cart(merged, inputs[:3], name, 4, scale=0.3, base=inputs[4])
    assert is_average(merged, inputs[:3], "model.norm.weight")


def test_cart_auto_goes_by_the_base_and_takes_two_models(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CartWarning)
        merged = merge(llamas[:2], merge_method="cart_auto", base_model=llamas[4])
    auto = CartSettings(lambda_="auto")
    for name in (QUERY.format(1), DOWN.format(2), "model.norm.weight"):
        tensors = [tensors[name] for tensors in inputs[:2]]
        expected = merge_tensors(tensors, auto, base=inputs[4][name], name=name)
        assert torch.equal(merged[name], expected), name
    assert is_average(merged, inputs[:2], TABLES[0])
    around = merge(
        llamas[:3],
        merge_method="cart_auto",
        base_model=llamas[4],
        parameters={"center": "average"},
    )
    without = merge(llamas[:3], merge_method="cart_auto")
    assert all(torch.equal(around[name], tensor) for name, tensor in without.items())


RECIPES_OF_OTHERS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"parameters": {"lambda": 0.9, "normalize": False}},
    "ties": {"parameters": {"normalize": True, "int8_mask": True}},
    "dare_ties": {"parameters": {"normalize": True, "rescale": True}},
    "dare_linear": {},
    "della": {"parameters": {"epsilon": 0.1}},
    "breadcrumbs": {"parameters": {"gamma": 0.01}},
    "sce": {"parameters": {"select_topk": 0.5}},
    "linear": {"parameters": {"normalize": True}},
    "model_stock": {"parameters": {"filter_wise": False}},
}


@pytest.mark.parametrize("method", RECIPES_OF_OTHERS)
def test_a_recipe_of_another_method_works_when_only_the_method_changes(
    method: str, merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    weights = [0.5, 0.3, 0.3]
    models = [
        {"model": model, "parameters": {"weight": weight, "density": 0.6}}
        for model, weight in zip(llamas, weights, strict=False)
    ]
    recipe = {"dtype": "float32", **RECIPES_OF_OTHERS[method]}
    if method != "linear":
        recipe["base_model"] = llamas[4]
    other = merge(models, merge_method=method, **recipe)
    merged = merge(models, merge_method="cart", **recipe)
    assert merged.keys() == other.keys()
    scale = recipe.get("parameters", {}).get("lambda", 1.0)
    name = QUERY.format(3)
    assert is_cart(merged, inputs[:3], name, 2, scale=scale, weights=weights)
    assert not torch.equal(merged[name], other[name])


@pytest.mark.parametrize(
    "options",
    [
        {"async_write": True, "write_threads": 2},
        {"low_cpu_memory": True},
        {"clone_tensors": True, "out_shard_size": 20_000},
        {"lazy_unpickle": True},
        {"device": "auto", "read_to_gpu": False},
    ],
    ids=repr,
)
def test_options_of_mergekit_do_not_change_the_result(
    options: dict[str, Any], merge: Callable[..., Tensors], llamas: list[str]
) -> None:
    expected = merge(llamas)
    merged = merge(llamas, options)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


def test_two_models_are_averaged_with_a_warning(
    merge: Callable[..., Tensors], llamas: list[str], inputs: list[Tensors]
) -> None:
    with pytest.warns(CartWarning, match=r"with two models.* CART is plain averaging"):
        merged = merge(llamas[:2])
    assert all(is_average(merged, inputs[:2], name) for name in merged)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CartWarning)
        merge(llamas[:3])
