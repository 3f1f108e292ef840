"""What doctor says about the values of a recipe's parameters: ranges, rank rules, filters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cart_plugin.linalg.rules import RANK_RULES
from cart_plugin.mergekit import SPEC
from tests.doctor.conftest import Report
from tests.doctor.test_recipe_settings import check, entries, sliced

__all__ = ["check"]


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"rank_ratio": -1}, "rank_ratio must lie between 0 and 1"),
        ({"rank_ratio": 2}, "rank_ratio must lie between 0 and 1"),
        ({"rank_ratio": "abc"}, "rank_ratio must be a number"),
        ({"rank_ratio": [0.1, 3]}, "correct the value 3"),
        ({"rank_ratio": [{"filter": "mlp", "value": [0, 7]}]}, "correct the value 7"),
        ({"rank": -2}, "rank must be"),
        ({"energy": 1.5}, "energy must lie between 0 and 1"),
        ({"lambda": "x"}, "lambda must be a number"),
        ({"center": "mean"}, "'average' or 'base'"),
        ({"svd": "slow"}, "svd must be one of"),
        ({"seed": "a"}, "parameters.seed"),
    ],
)
def test_values_out_of_range(
    parameters: dict[str, Any], text: str, check: Callable[..., Report]
) -> None:
    check(parameters=parameters).has_only_problem(text, "correct the value")


@pytest.mark.parametrize(
    ("rank", "advice"),
    [
        (0.08, "did you mean rank_ratio?"),
        ([{"filter": "mlp", "value": 0.5}, {"value": 4}], "did you mean rank_ratio?"),
        ([0, 0.16, 0], "did you mean rank_ratio?"),
        (2.5, "write 2"),
        ([{"filter": "mlp", "value": 2.5}, {"value": 4}], "write 2"),
    ],
)
def test_rank_that_is_no_number_of_directions(
    rank: object, advice: str, check: Callable[..., Report]
) -> None:
    report = check(parameters={"rank": rank})
    report.has_only_problem("parameters.rank: a rank is a whole number of directions", advice)


@pytest.mark.parametrize("rank", [0, 4, 4.0, [1, 4], [1, 2.5, 4], [{"filter": "mlp", "value": 3}]])
def test_whole_ranks_and_gradients_between_them_are_fine(
    rank: object, check: Callable[..., Report]
) -> None:
    assert check(parameters={"rank": rank}).problems == []


@pytest.mark.parametrize(
    "scale", [0.3, [0.1, 0.3], [{"filter": "mlp", "value": 0.3}, {"value": 1.0}]]
)
def test_lambda_of_another_method(scale: object, check: Callable[..., Report]) -> None:
    report = check(parameters={"lambda": scale})
    report.has_only_warning(
        "parameters.lambda: 0.3 leaves little but the plain average",
        "a lambda of 0.3 fits task_arithmetic; CART's usual values are 1 to 3",
    )


@pytest.mark.parametrize("scale", [0.5, 1, 2.3, 0, -1, [0, 0.3, 1]])
def test_other_lambdas_pass(scale: object, check: Callable[..., Report]) -> None:
    check(parameters={"lambda": scale}).is_clean()


def test_small_lambdas_suit_the_base_as_centre(
    check: Callable[..., Report], llamas: list[str]
) -> None:
    parameters = {"lambda": 0.3, "center": "base"}
    check(models=entries(llamas[:2]), base_model=llamas[2], parameters=parameters).is_clean()


def test_the_rank_rules_are_the_cores() -> None:
    assert set(RANK_RULES) <= {parameter.name for parameter in SPEC.parameters}


def test_weight_that_is_no_number(check: Callable[..., Report], llamas: list[str]) -> None:
    report = check(models=entries(llamas, {"weight": "much"}))
    report.has_only_problem("models[0].parameters.weight: weight must be a number")


def test_invalid_values_stop_the_plan_without_a_second_problem(
    check: Callable[..., Report],
) -> None:
    report = check(parameters={"rank_ratio": 2})
    assert "mergekit cannot plan the merge as it is" in report.warnings[0]


def test_two_rank_rules_at_one_place(check: Callable[..., Report]) -> None:
    problems = check(parameters={"rank": 4, "energy": 0.9}).problems
    assert "parameters.rank: rank and energy are two rank rules at once" in problems[0]
    assert "rank and energy both hold for 48 tensors" in problems[1]


def test_two_rank_rules_through_levels(check: Callable[..., Report], llamas: list[str]) -> None:
    report = check(**sliced(llamas, parameters={"rank": 2}), parameters={"rank_ratio": 0.1})
    report.has_only_problem("rank_ratio and rank both hold for 48 tensors", "one rank rule")


def test_two_rank_rules_through_filters(check: Callable[..., Report]) -> None:
    attention = [{"filter": "q_proj", "value": 4}]
    report = check(parameters={"rank": attention, "rank_ratio": 0.1})
    report.has_only_problem("rank_ratio and rank both hold for 5 tensors", "q_proj")


def test_rank_rules_for_different_tensors_are_fine(check: Callable[..., Report]) -> None:
    parameters = {
        "rank": [{"filter": "self_attn", "value": 4}],
        "energy": [{"filter": "mlp", "value": 0.5}],
    }
    check(parameters=parameters).is_clean()


def test_filter_that_matches_nothing(check: Callable[..., Report]) -> None:
    setting = [{"filter": "c_attn", "value": 0.2}, {"value": 0.1}]
    report = check(parameters={"rank_ratio": setting})
    report.has_only_warning("the filter c_attn matches no tensor", "such as model.layers.")


def test_filter_that_matches_only_averaged_tensors(check: Callable[..., Report]) -> None:
    setting = [{"filter": "attention", "value": 0.2}, {"value": 0.1}]
    report = check(parameters={"rank_ratio": setting})
    report.has_only_warning("only tensors that are averaged anyway", "post_attention_layernorm")


def test_rank_zero_everywhere_is_the_average(check: Callable[..., Report]) -> None:
    check(parameters={"rank_ratio": 0}).has_only_warning("the result is the plain average")


def test_weights_that_sum_to_nothing(check: Callable[..., Report], llamas: list[str]) -> None:
    mlp = [{"filter": "mlp", "value": 0}, {"value": 1}]
    report = check(models=entries(llamas, *[{"weight": mlp}] * 3))
    report.has_only_problem("weights sum to 0 or less for 15 tensors", "positive weight")
