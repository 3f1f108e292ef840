"""Bad input is refused with a message that names model and tensor."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

from cart_plugin import CartError, CartSettings, CartWarning, merge_state_dicts, merge_tensors
from tests.merging.helpers import state_dict, versions
from tests.support import random


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(6, 7), (6,), (2, 6, 7)], ids=str)
def test_values_that_are_not_finite_name_model_and_tensor(
    value: float, shape: tuple[int, ...]
) -> None:
    tensors = versions(*shape)
    tensors[2].view(-1)[:2] = value
    count = math.prod(shape)
    message = rf"tensor 'q\.weight' of gamma holds 2 NaN or infinite values out of {count}"
    for weights in (None, [1.0, 1.0, 0.0, 1.0]):
        with pytest.raises(CartError, match=message):
            merge_tensors(
                tensors,
                name="q.weight",
                models=["alpha", "beta", "gamma", "delta"],
                weights=weights,
            )


def test_opposite_infinities_are_found() -> None:
    tensors = versions(3, 4)
    tensors[0][0, 0], tensors[1][0, 0] = math.inf, -math.inf
    with pytest.raises(CartError, match="tensor of 0 holds 1 NaN or infinite values out of 12"):
        merge_tensors(tensors)


def test_broken_base_is_named_where_it_is_the_centre() -> None:
    given = CartSettings(center="base")
    broken = torch.full((4, 4), math.nan)
    with pytest.raises(CartError, match="of the base model holds 16 NaN or infinite values"):
        merge_tensors(versions(4, 4), given, base=broken)
    tensors = versions(4, 4)
    tensors[1][0, 0] = math.nan
    with pytest.raises(CartError, match="tensor of 1 holds 1 NaN"):
        merge_tensors(tensors, given, base=torch.zeros(4, 4))


def test_shapes_that_differ_name_both_models() -> None:
    tensors = [*versions(4, 5, count=2), random(4, 6)]
    message = r"tensor 'w' is \(4, 5\) in a but \(4, 6\) in c; merged models must have the same"
    with pytest.raises(CartError, match=message):
        merge_tensors(tensors, name="w", models=["a", "b", "c"])
    with pytest.raises(CartError, match=r"but \(2, 2\) in the base model"):
        merge_tensors(tensors[:2], CartSettings(center="base"), base=torch.zeros(2, 2))


def test_a_missing_tensor_names_the_model_that_lacks_it() -> None:
    models = {name: state_dict(seed) for seed, name in enumerate("abc")}
    del models["b"]["fc.bias"]
    message = r"b lacks 1 tensor that other models have: fc\.bias; merged models must have"
    with pytest.raises(CartError, match=message):
        merge_state_dicts(models)
    base = state_dict(9) | {f"head.{i}": torch.zeros(1) for i in range(5)}
    with pytest.raises(CartError, match=r"lacks .* head\.0, head\.1, head\.2 and 2 more;"):
        merge_state_dicts([state_dict(0)] * 3, CartSettings(center="base"), base=base)


def test_fewer_than_two_models_are_refused() -> None:
    message = r"at least two fine-tuned models; tensor 'w' comes from 1: a"
    with pytest.raises(CartError, match=message):
        merge_tensors([random(3, 3)], name="w", models=["a"])
    with pytest.raises(CartError, match="comes from 0: none"):
        merge_tensors([])
    with pytest.raises(CartError, match="at least two fine-tuned models"):
        merge_state_dicts([state_dict(0)])
    with pytest.raises(CartError, match="at least two fine-tuned models, got none"):
        merge_state_dicts([])


def test_what_is_no_state_dict_is_named() -> None:
    held = {name: state_dict(seed) for seed, name in enumerate("ab")}
    for wrong in ("./models/math", torch.nn.Linear(2, 2)):
        with pytest.raises(CartError, match=r"^b must be a state dict, .* got (str|Linear);"):
            merge_state_dicts(held | {"b": wrong})
    with pytest.raises(CartError, match=r"^the base model must be a state dict"):
        merge_state_dicts(held, base="./models/base")
    with pytest.raises(CartError, match=r"settings must be CartSettings\(...\), got dict"):
        merge_state_dicts(held, {"lambda_": "auto"})
    with pytest.raises(CartError, match=r"weights must be numbers, got \['1', 2\]"):
        merge_state_dicts(held, weights=["1", 2])


def test_two_models_warn_only_where_it_matters() -> None:
    pair = versions(5, 6, count=2)
    base = random(5, 6, seed=9)
    auto = CartSettings(lambda_="auto")
    for known in (None, base):
        with pytest.warns(CartWarning, match=r"; use cart_auto \(lambda: auto\) with their base"):
            merge_tensors(pair, base=known)
    with pytest.warns(CartWarning, match=r"; give their base model, which shows where"):
        merge_tensors(pair, auto)
    with pytest.warns(CartWarning, match=r"; leave center out, with the base model given"):
        merge_tensors(pair, CartSettings(lambda_="auto", center="average"), base=base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_tensors(pair, CartSettings(rank=0))
        merge_tensors(pair, CartSettings(center="base"), base=base)
        merge_tensors(pair, auto, base=base)
        merge_tensors(versions(6, count=2))
        merge_tensors(versions(5, 6, count=3))


def test_three_models_of_which_one_weighs_nothing_are_averaged_with_a_warning() -> None:
    tensors = [random(6, 8, seed=seed) for seed in range(3)]
    with pytest.warns(CartWarning, match="plain averaging"):
        merged = merge_tensors(tensors, CartSettings(rank=2, lambda_=5.0), weights=[1, 1, 0])
    assert torch.allclose(merged, (tensors[0] + tensors[1]) / 2, atol=1e-5)


def test_center_base_without_a_base_is_refused() -> None:
    given = CartSettings(center="base")
    with pytest.raises(CartError, match="center is 'base', but there is no base model"):
        merge_tensors(versions(4, 4), given)
    with pytest.raises(CartError, match=r"tensor 'fc\.weight': center is 'base', but"):
        merge_state_dicts([state_dict(seed) for seed in range(3)], given)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lambda_": math.nan}, "lambda must be a finite number or 'auto', got nan"),
        ({"lambda_": math.inf}, "lambda must be a finite number or 'auto', got inf"),
        ({"center": "mean"}, "center must be 'average' or 'base', got 'mean'"),
        ({"svd": "quick"}, "svd must be one of auto, exact, fast, subspace, sketch, got 'quick'"),
        ({"lambda_": "1"}, "lambda must be a finite number or 'auto', got '1'"),
        ({"seed": 0.5}, r"seed must be a whole number, got 0\.5"),
        ({"rank": 4, "energy": 0.5}, r"rank=4 and energy=0\.5 are two rank rules at once"),
        ({"rank_ratio": 2}, "rank_ratio must lie between 0 and 1, got 2"),
    ],
    ids=repr,
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CartError, match=message):
        CartSettings(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 2.5}, "rank must be 0 or a positive whole number, got 2.5"),
        ({"rank": True}, "rank must be a number, got True"),
        ({"rank": "3"}, "rank must be a number, got '3'"),
        ({"rank_ratio": "0.1"}, "rank_ratio must be a number, got '0.1'"),
        ({"lambda_": "2"}, "lambda must be a finite number or 'auto', got '2'"),
        ({"lambda_": True}, "lambda must be a finite number or 'auto', got True"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"seed": "x"}, "seed must be a whole number, got 'x'"),
    ],
    ids=repr,
)
def test_values_of_the_wrong_kind_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CartError, match=message):
        CartSettings(**values)


@pytest.mark.parametrize(
    "weights",
    [
        [1.0, -1.0, 0.0],
        [0.0, 0.0, 0.0],
        [-1.0, -1.0, -1.0],
    ],
    ids=repr,
)
def test_weights_that_sum_to_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(CartError, match="tensor 'w': weights must sum to more than 0, got "):
        merge_tensors(versions(4, 4, count=3), weights=weights, name="w")


@pytest.mark.parametrize(
    "weights",
    [
        [math.nan, 1.0, 1.0],
        [math.inf, 1.0, 1.0],
        [math.inf, -math.inf, 1.0],
        [1e308, 1e308, 1e308],
    ],
    ids=repr,
)
def test_weights_without_a_finite_sum_are_refused(weights: list[float]) -> None:
    with pytest.raises(CartError, match="tensor 'w': weights must be finite numbers, got "):
        merge_tensors(versions(4, 4, count=3), weights=weights, name="w")


def test_as_many_weights_as_models_are_required() -> None:
    with pytest.raises(CartError, match="3 models but 2 weights"):
        merge_tensors(versions(4, 4, count=3), weights=[1.0, 1.0])


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
def test_quantised_weights_are_refused(dtype: torch.dtype) -> None:
    tensors = [*versions(4, 4, count=2), torch.ones(4, 4, dtype=dtype)]
    message = rf"tensor 'w' of c is {dtype}; quantised or integer weights cannot be averaged"
    with pytest.raises(CartError, match=message):
        merge_tensors(tensors, name="w", models=["a", "b", "c"])
    with pytest.raises(CartError, match="quantised or integer weights"):
        merge_state_dicts([{"w": tensor} for tensor in tensors])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_refused(dtype: torch.dtype) -> None:
    tensors = [random(6, 8, seed=seed).to(dtype) for seed in range(3)]
    with pytest.raises(CartError, match="quantised or integer weights cannot be averaged"):
        merge_tensors(tensors)


def test_weights_that_are_not_loaded_are_refused() -> None:
    tensors = [*versions(4, 4, count=2), torch.empty(4, 4, device="meta")]
    with pytest.raises(CartError, match="tensor of 2 is on the meta device"):
        merge_tensors(tensors)


def test_tensors_without_values_are_refused() -> None:
    with pytest.raises(CartError, match="meta device"):
        merge_tensors([torch.zeros(4, 5, device="meta")] * 3)


def test_buffers_that_differ_are_refused() -> None:
    models = {name: state_dict(seed) for seed, name in enumerate("abc")}
    models["c"]["position_ids"] = models["c"]["position_ids"] + 1
    message = "tensor 'position_ids' holds integers that differ between a and c; only buffers"
    with pytest.raises(CartError, match=message):
        merge_state_dicts(models)
    models["c"]["position_ids"] = torch.arange(5)
    with pytest.raises(CartError, match="differ between a and c"):
        merge_state_dicts(models)


def test_weights_by_name_are_refused() -> None:
    tensors = [torch.randn(4, 5) for _ in range(3)]
    with pytest.raises(CartError, match="a list in the order of the models, not a mapping"):
        merge_tensors(tensors, weights={"a": 1.0, "b": 1.0, "c": 1.0})  # type: ignore[arg-type]


def test_a_lambda_that_no_sum_can_hold_is_refused() -> None:
    with pytest.raises(CartError, match="lambda must be a finite number or 'auto', got 1e"):
        CartSettings(lambda_=1e39)


def test_entries_that_are_no_tensors_are_named() -> None:
    dicts: list[Any] = [{"fc.weight": random(4, 5, seed=seed), "epoch": 3} for seed in range(3)]
    with pytest.raises(CartError, match="epoch of 0 is a int, not a tensor; leave it out"):
        merge_state_dicts(dicts)


def test_counters_of_any_kind_end_at_the_largest() -> None:
    kinds = (torch.uint16, torch.int64, torch.uint8)
    dicts = [{str(kind): torch.tensor(value, dtype=kind) for kind in kinds} for value in (3, 7, 5)]
    for name, value in merge_state_dicts(dicts).items():
        assert (value.item(), str(value.dtype)) == (7, name)


def test_a_base_that_lacks_a_tensor_is_not_asked_for_what_is_averaged() -> None:
    around = CartSettings(center="base")
    vectors = [random(5, seed=seed) for seed in range(3)]
    expected = torch.stack(vectors).mean(0)
    assert torch.allclose(merge_tensors(vectors, around, name="norm.weight"), expected)
    with pytest.raises(CartError, match="there is no base model, or it lacks this tensor"):
        merge_tensors([random(4, 5, seed=seed) for seed in range(3)], around, name="up.weight")
