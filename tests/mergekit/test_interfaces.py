"""The method `cart` through mergekit's Python interfaces."""

from __future__ import annotations

import math
from typing import Any

import mergekit.merge_methods as methods
import pytest
import torch

from cart_plugin.errors import CartError, CartWarning
from cart_plugin.mergekit import register
from cart_plugin.merging.cart import merge_tensors
from cart_plugin.merging.settings import CartSettings
from tests.mergekit.helpers import is_average, is_cart, matrices
from tests.support import cart_formula, random, relative_error


def test_merge_tensors_takes_the_parameters_of_a_recipe() -> None:
    tensors = matrices()
    merged = methods.merge_tensors(tensors, "cart")
    assert relative_error(merged, cart_formula(tensors, 1)) <= 1e-5
    parameters = {"rank_ratio": 0.2, "lambda": 1.5, "weight": [1.0, 2.0, 3.0, 0.5]}
    merged = methods.merge_tensors(tensors, "cart", parameters=parameters)
    expected = cart_formula(tensors, 4, scale=1.5, weights=[1.0, 2.0, 3.0, 0.5])
    assert relative_error(merged, expected) <= 1e-5
    merged = methods.merge_tensors(tensors, "cart", parameters={"rank": 3, "svd": "exact"})
    assert relative_error(merged, cart_formula(tensors, 3)) <= 1e-5


def test_merge_tensors_binds_weights_by_name_and_leaves_the_base_out() -> None:
    tensors = matrices()
    merged = methods.merge_tensors(
        tensors,
        "cart",
        ids=["a", "b", "base", "c"],
        base_index=2,
        parameters={"rank": 2, "weight": {"c": 3.0, "a": 1.0, "b": 2.0}},
    )
    tuned = [tensors[i] for i in (0, 1, 3)]
    expected = cart_formula(tuned, 2, weights=[1.0, 2.0, 3.0])
    assert relative_error(merged, expected) <= 1e-5
    merged = methods.merge_tensors(
        tensors, "cart", base_index=2, parameters={"rank": 2, "center": "base"}
    )
    assert relative_error(merged, cart_formula(tuned, 2, base=tensors[2])) <= 1e-5


def test_merge_tensors_keeps_or_casts_the_dtype() -> None:
    halves = matrices(dtype=torch.bfloat16)
    merged = methods.merge_tensors(halves, "cart")
    single = methods.merge_tensors(halves, "cart", dtype=torch.float32)
    assert (merged.dtype, single.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(merged, single.to(torch.bfloat16))
    cast = methods.merge_tensors(halves, "cart", out_dtype=torch.float16)
    assert cast.dtype == torch.float16


def test_merge_state_dicts_knows_tables_by_their_names() -> None:
    models = [
        {
            "lm_head.weight": random(20, 30, seed=seed),
            "fc.weight": random(20, 30, seed=seed + 10),
            "steps": torch.tensor(7),
        }
        for seed in range(3)
    ]
    merged = methods.merge_state_dicts(models, "cart", parameters={"rank": 2})
    assert list(merged) == list(models[0])
    assert is_average(merged, models, "lm_head.weight")
    assert is_cart(merged, models, "fc.weight", 2)
    assert merged["steps"] == 7


def test_merge_state_dicts_takes_modules_and_a_base() -> None:
    modules = {}
    for seed, name in enumerate(["base", "a", "b", "c"]):
        torch.manual_seed(seed)
        modules[name] = torch.nn.Linear(30, 20)
    merged = methods.merge_state_dicts(
        modules, "cart", base="base", parameters={"rank": 2, "center": "base"}
    )
    states = [modules[name].state_dict() for name in "abc"]
    assert is_cart(merged, states, "weight", 2, base=modules["base"].state_dict())
    assert is_average(merged, states, "bias")


def test_tables_that_mergekit_marks_are_averaged_whatever_their_name() -> None:
    tensors = matrices()
    for axis, k in ((0, 0), (1, 0), (None, 2)):
        group = methods.TensorGroup.from_tensors(
            tensors, name="model.output.weight", vocabulary_axis=axis
        )
        (merged,) = methods.get("cart")([group], parameters={"rank": 2})
        assert relative_error(merged, cart_formula(tensors, k)) <= 1e-5


def test_unknown_parameters_are_refused_where_mergekit_lets_us_see_them() -> None:
    with pytest.raises(TypeError, match=r"Unknown parameter.* for cart: rank_rati"):
        methods.merge_tensors(matrices(), "cart", parameters={"rank_rati": 0.1})
    models = [{"w": tensor} for tensor in matrices()]
    with pytest.raises(TypeError, match="rank_rati"):
        methods.merge_state_dicts(models, "cart", parameters={"rank_rati": 0.1})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rank_ratio": -1}, "rank_ratio must lie between 0 and 1, got -1"),
        ({"rank_ratio": 2}, "rank_ratio must lie between 0 and 1, got 2"),
        ({"rank_ratio": "abc"}, "rank_ratio must be a number, got 'abc'"),
        ({"rank_ratio": True}, "rank_ratio must be a number, got True"),
        ({"rank": -3}, "rank must be 0 or a positive whole number, got -3"),
        ({"rank": math.inf}, "rank must be a finite number, got inf"),
        ({"energy": -0.5}, r"energy must lie between 0 and 1, got -0\.5"),
        ({"rank": 4, "energy": 0.5}, r"rank=4 and energy=0\.5 are two rank rules at once"),
        ({"lambda": "x"}, "lambda must be a number, got 'x'"),
        ({"lambda": math.nan}, "lambda must be a finite number, got nan"),
        ({"weight": math.nan}, "weight must be a finite number, got nan"),
        ({"weight": [1.0, -1.0, 0.0, 0.0]}, "weights must sum to more than 0"),
        ({"center": "mean"}, "center must be 'average' or 'base', got 'mean'"),
        ({"center": "base"}, "center is 'base', but there is no base model"),
        ({"svd": "quick"}, "svd must be one of auto, exact, fast, subspace, sketch, got 'quick'"),
    ],
    ids=repr,
)
def test_bad_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.merge_tensors(matrices(), "cart", parameters=parameters)


def test_one_model_is_refused_and_two_warn() -> None:
    with pytest.raises(CartError, match="at least two fine-tuned models beside the base"):
        methods.merge_tensors(matrices(1), "cart")
    with pytest.raises(CartError, match="got 1: 1"):
        methods.merge_tensors(matrices(2), "cart", base_index=0)
    with pytest.warns(CartWarning, match=r"with two models.* CART is plain averaging"):
        merged = methods.merge_tensors(matrices(2), "cart")
    assert relative_error(merged, cart_formula(matrices(2), 0)) <= 1e-6


def test_cart_auto_is_the_core_with_lambda_auto() -> None:
    tensors = matrices()
    expected = merge_tensors(tensors, CartSettings(lambda_="auto"), name="w")
    assert torch.equal(methods.merge_tensors(tensors, "cart_auto", name="w"), expected)
    parameters = {"rank": 2, "weight": [1.0, 2.0, 3.0, 0.5], "svd": "exact"}
    merged = methods.merge_tensors(tensors, "cart_auto", parameters=parameters, name="w")
    settings = CartSettings(lambda_="auto", rank=2, svd="exact")
    expected = merge_tensors(tensors, settings, weights=[1.0, 2.0, 3.0, 0.5], name="w")
    assert torch.equal(merged, expected)
    with pytest.raises(TypeError, match="for cart_auto: lambda"):
        methods.merge_tensors(tensors, "cart_auto", parameters={"lambda": 2.0})


def test_registering_again_changes_nothing() -> None:
    before = methods.registered_methods()
    register()
    assert methods.registered_methods() == before
    names = [method.spec.name for method in before]
    assert names.count("cart") == names.count("cart_auto") == 1
