"""How much each model counts when another method merges a recipe's."""

from __future__ import annotations

from typing import Any

import pytest
from mergekit.config import MergeConfiguration

from cart_plugin.compare.variants import parse_assignment, variants
from cart_plugin.doctor.layout import groups


def recipe(method: str, weights: list[Any], **more: Any) -> dict[str, Any]:
    models = [
        {"model": name, **({} if weight is None else {"parameters": {"weight": weight}})}
        for name, weight in zip("abcd", weights, strict=False)
    ]
    return {"merge_method": method, "base_model": "base", "models": models, **more}


def carried(document: dict[str, Any], method: str, **sets: Any) -> dict[str, Any]:
    fixed = [parse_assignment(f"{method}.{k}={v}", single=True) for k, v in sets.items()]
    (found,) = variants(document, [method], fixed)
    assert not found.error
    MergeConfiguration.model_validate(dict(found.recipe))
    return dict(found.recipe)


def weights(made: dict[str, Any]) -> list[list[Any]]:
    """By group, of the models that are merged, the base model's aside."""
    config = MergeConfiguration.model_validate(made)
    common = (config.parameters or {}).get("weight")
    return [
        [
            (entry.parameters or {}).get("weight", common)
            for entry in group.entries
            if str(entry.model) != group.base
        ]
        for group in groups(config)
    ]


def test_linear_is_an_average_whatever_the_recipe_says_of_differences() -> None:
    parameters = {"normalize": False, "int8_mask": True}
    document = recipe("dare_ties", [0.6, 0.6, 0.6], parameters=parameters)
    made = carried(document, "linear")
    assert made["parameters"]["normalize"] is True
    assert weights(made) == [[pytest.approx(1 / 3, abs=1e-6)] * 3]
    assert carried(document, "ties")["parameters"]["normalize"] is False  # it means the same
    assert weights(carried(document, "ties")) == [[0.6] * 3]
    summed = {**document, "merge_method": "linear"}
    assert carried(summed, "linear")["parameters"]["normalize"] is False  # its own
    assert carried(summed, "ties")["parameters"]["normalize"] is True


@pytest.mark.parametrize("own", ["cart", "cart_auto", "linear", "ties", "multislerp"])
@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties", "linear"])
def test_weights_of_which_the_ratio_counts_sum_to_one(own: str, method: str) -> None:
    document = recipe(own, [2, 1, 1])
    expected = [2, 1, 1] if own == method else [0.5, 0.25, 0.25]
    assert weights(carried(document, method)) == [expected]
    assert weights(carried(recipe(own, [2, 2, 2]), method))[0] == (
        [2, 2, 2] if own == method else [pytest.approx(1 / 3, abs=1e-6)] * 3
    )


@pytest.mark.parametrize("own", ["task_arithmetic", "dare_ties"])
def test_weights_that_are_amounts_stay(own: str) -> None:
    assert weights(carried(recipe(own, [0.6, 0.6, 0.6]), "breadcrumbs")) == [[0.6] * 3]


def test_a_model_without_a_weight_counts_as_it_does_in_cart() -> None:
    assert weights(carried(recipe("cart", [2, None, None]), "linear")) == [[0.5, 0.25, 0.25]]
    common = recipe("cart", [2, None, None], parameters={"weight": 1})
    made = carried(common, "task_arithmetic")
    assert weights(made) == [[0.5, 0.25, 0.25]]
    assert "weight" not in made["parameters"]


def test_weights_by_tensor_are_divided_by_the_method() -> None:
    document = recipe("cart", [[2, 1], 1, [{"filter": "mlp", "value": 3}, {"value": 1}]])
    made = carried(document, "task_arithmetic")
    assert made["parameters"]["normalize"] is True
    assert weights(made)[0][0] == [2, 1]
    assert carried(recipe("cart", [2, 1, 1]), "task_arithmetic")["parameters"]["normalize"] is False


def test_a_weight_that_is_set_stays() -> None:
    assert weights(carried(recipe("cart", [2, 1, 1]), "task_arithmetic", weight=0.7)) == [[0.7] * 3]
    made = carried(recipe("dare_ties", [0.6] * 3), "ties", normalize="false")
    assert weights(made) == [[0.6] * 3]


def sources(text: str, **given: Any) -> list[dict[str, Any]]:
    names = {"B": "base"}
    return [
        {
            "model": names.get(name, name),
            "layer_range": [0, 1],
            **({"parameters": {"weight": given[name]}} if name in given else {}),
        }
        for name in text
    ]


def test_the_base_is_not_averaged_in_from_slices_and_modules() -> None:
    document: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": "base",
        "slices": [
            {"sources": sources("Bab", a=0.5, b=0.5)},
            {"sources": sources("B")},
            {"sources": sources("abB", a=3, b=1), "base_model": "base"},
        ],
    }
    made = carried(document, "linear")
    config = MergeConfiguration.model_validate(made)
    assert [group.models for group in groups(config)] == [["a", "b"], ["base"], ["a", "b"]]
    assert [group.base for group in groups(config)] == [None] * 3
    assert weights(made) == [[0.5, 0.5], [1.0], [0.75, 0.25]]
    models = [{"model": name} for name in ("base", "a", "b", "c")]
    document = {
        "merge_method": "ties",
        "base_model": "base",
        "modules": {"default": {"models": models}},
    }
    made = carried(document, "linear")
    assert "base_model" not in made
    assert [entry["model"] for entry in made["modules"]["default"]["models"]] == ["a", "b", "c"]
    assert weights(made) == [[pytest.approx(1 / 3, abs=1e-6)] * 3]


def test_weights_of_slices_sum_to_one_in_each() -> None:
    document = {
        "merge_method": "cart",
        "base_model": "base",
        "slices": [
            {"sources": sources("Babc"), "parameters": {"weight": 5}},
            {"sources": sources("Bab")},
        ],
    }
    made = carried(document, "task_arithmetic")
    assert weights(made) == [[pytest.approx(1 / 3, abs=1e-6)] * 3, [0.5, 0.5]]
    assert "parameters" not in made["slices"][0]


@pytest.mark.parametrize(
    ("own", "method", "name"),
    [("della", "ram", "epsilon"), ("ram", "della", "epsilon"), ("cart", "ties", "lambda")],
)
def test_what_means_something_else_is_not_carried(own: str, method: str, name: str) -> None:
    made = carried(recipe(own, [1, 1, 1], parameters={name: 0.07}), method)
    assert made["parameters"].get(name) != 0.07
    assert carried(recipe(own, [1, 1, 1], parameters={name: 0.07}), own)["parameters"][name] == 0.07


def test_a_threshold_of_nearness_is_no_share_of_the_way() -> None:
    document = {
        "merge_method": "nearswap",
        "base_model": "base",
        "models": [{"model": "a"}],
        "parameters": {"t": 0.001},
    }
    (found,) = variants(document, ["slerp"])
    assert found.error.startswith("slerp needs t")
    (found,) = variants(document, ["nearswap"])
    assert not found.error
