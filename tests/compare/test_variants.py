"""The recipes that a recipe implies for other methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mergekit.config import MergeConfiguration

from cart_plugin.compare.variants import Variant, absolute, parse_assignment, variants
from cart_plugin.errors import CartError

RECIPE: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {"model": "a", "parameters": {"weight": 0.6, "density": 0.5}},
        {"model": "b", "parameters": {"weight": 0.4}},
        {"model": "c", "parameters": {"weight": 0.2}},
    ],
    "parameters": {"lambda": 0.8, "int8_mask": True},
    "dtype": "float32",
}


def one(recipe: dict[str, Any], method: str, **sets: Any) -> Variant:
    fixed = [parse_assignment(f"{method}.{k}={v}", single=True) for k, v in sets.items()]
    (variant,) = variants(recipe, [method], fixed)
    return variant


def test_the_recipes_own_method_keeps_its_settings() -> None:
    made = one(RECIPE, "ties").recipe
    assert made["models"] == RECIPE["models"]
    assert made["parameters"]["lambda"] == 0.8
    assert made["parameters"]["int8_mask"] is True
    # What the recipe left to mergekit is written down.
    assert made["parameters"]["normalize"] is True
    assert "weight" not in made["parameters"]


def test_settings_that_a_method_lacks_are_left_out() -> None:
    made = one(RECIPE, "cart").recipe
    assert [entry["parameters"] for entry in made["models"]] == [
        {"weight": 0.6},
        {"weight": 0.4},
        {"weight": 0.2},
    ]
    assert not {"density", "int8_mask", "rank", "energy"} & set(made["parameters"])


def test_the_default_rank_of_cart_is_not_written_down() -> None:
    # It depends on the models; a rank_ratio of 0.08 would keep adapters whole.
    assert "rank_ratio" not in one(RECIPE, "cart").settings
    assert one(RECIPE, "cart", rank_ratio=0.08).settings["rank_ratio"] == 0.08


def test_lambda_is_carried_over_where_it_means_the_same() -> None:
    assert one(RECIPE, "dare_ties").settings["lambda"] == 0.8
    assert one(RECIPE, "cart").settings["lambda"] == 1.0
    assert one({**RECIPE, "merge_method": "cart"}, "ties").settings["lambda"] == 1.0


def test_a_weight_that_the_recipe_lacks_is_equal_and_sums_to_one() -> None:
    plain = {**RECIPE, "models": [{"model": name} for name in "abcd"]}
    assert one(plain, "task_arithmetic").settings["weight"] == 0.25
    assert one(plain, "cart").settings["weight"] == 1.0  # cart's own default


def test_a_method_that_ignores_the_base_gets_none() -> None:
    made = one(RECIPE, "linear").recipe
    assert "base_model" not in made
    assert made["parameters"] == {"normalize": True}


def test_a_base_among_the_models_is_not_averaged_in() -> None:
    models = [{"model": "base"}, *RECIPE["models"]]
    made = one({**RECIPE, "models": models}, "linear").recipe
    assert [entry["model"] for entry in made["models"]] == ["a", "b", "c"]
    assert len(one({**RECIPE, "models": models}, "ties").recipe["models"]) == 4


@pytest.mark.parametrize("sign", ["@", "+"])
def test_models_in_parts_stay_what_they_are(
    sign: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line they would be another folder, of another revision or with an adapter."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", f"a{sign}v2", "b", "c"):
        Path(name).mkdir()
    parts = {"model": {"path": f"a{sign}v2"}}
    recipe = {
        "merge_method": "linear",
        "base_model": parts,
        "models": [
            {"model": parts},
            {"model": "b"},
            {"model": {"model": {"path": "c"}, "override_architecture": "MistralForCausalLM"}},
            {"model": {"model": {"path": "org/b", "revision": "main"}}},
        ],
        "tokenizer": {"source": parts},
    }
    made = absolute(MergeConfiguration.model_validate(recipe))
    kept = {"model": {"path": f"{tmp_path}/a{sign}v2"}}
    assert [entry["model"] for entry in made["models"]] == [
        kept,
        f"{tmp_path}/b",
        {"model": {"path": f"{tmp_path}/c"}, "override_architecture": "MistralForCausalLM"},
        "org/b@main",
    ]
    assert made["base_model"] == made["tokenizer"]["source"] == kept
    # The base model is found among the models.
    assert [entry["model"] for entry in one(made, "linear").recipe["models"]] == [
        entry["model"] for entry in made["models"][1:]
    ]


def test_a_value_that_is_given_twice_is_one_row() -> None:
    grid = parse_assignment("cart.lambda=1,1.0,2", single=False)
    assert len(variants(RECIPE, ["cart"], grids=[grid])) == 2


def test_set_replaces_the_recipes_settings_of_single_models_too() -> None:
    made = one(RECIPE, "ties", density=0.3).recipe
    assert made["parameters"]["density"] == 0.3
    assert made["models"][0]["parameters"] == {"weight": 0.6}


def test_cart_auto_has_its_own_rank() -> None:
    recipe = {**RECIPE, "merge_method": "cart", "parameters": {"rank_ratio": 0.2, "lambda": 2.0}}
    made = one(recipe, "cart_auto").recipe
    assert "rank_ratio" not in made["parameters"]  # it depends on the base and the models
    assert "lambda" not in made["parameters"]
    assert one(recipe, "cart_auto", rank=4).settings["rank"] == 4


def test_a_rank_rule_replaces_another_one() -> None:
    recipe = {**RECIPE, "merge_method": "cart", "parameters": {"rank_ratio": 0.2}}
    made = one(recipe, "cart", rank=4).recipe
    assert made["parameters"]["rank"] == 4
    assert "rank_ratio" not in made["parameters"]


def test_grids_of_a_method_multiply() -> None:
    grids = [
        parse_assignment(text, single=False)
        for text in ("cart.rank_ratio=0.1,0.2", "cart.lambda=1,2")
    ]
    made = variants(RECIPE, ["cart", "linear"], grids=grids)
    assert [variant.name for variant in made] == [
        "cart-rank_ratio=0.1-lambda=1.0",
        "cart-rank_ratio=0.1-lambda=2.0",
        "cart-rank_ratio=0.2-lambda=1.0",
        "cart-rank_ratio=0.2-lambda=2.0",
        "linear",
    ]
    assert [variant.recipe["parameters"].get("lambda") for variant in made] == [1, 2, 1, 2, None]


def test_every_recipe_is_one_that_mergekit_reads() -> None:
    methods = ["cart", "linear", "ties", "dare_ties", "della", "breadcrumbs", "model_stock", "sce"]
    for variant in variants(RECIPE, methods):
        assert not variant.error
        assert MergeConfiguration.model_validate(dict(variant.recipe)).merge_method in methods


@pytest.mark.parametrize(
    ("method", "recipe", "reason"),
    [
        ("ties", {k: v for k, v in RECIPE.items() if k != "base_model"}, "needs a base_model"),
        ("slerp", RECIPE, "slerp needs t"),
        ("arcee_fusion", RECIPE, "requires exactly 2 inputs; got 4"),
    ],
)
def test_a_method_that_cannot_take_the_models_says_why(
    method: str, recipe: dict[str, Any], reason: str
) -> None:
    assert reason in one(recipe, method).error


def slices(*groups: str, **more: Any) -> dict[str, Any]:
    """A recipe whose slices merge the models of these letters."""
    return {
        "merge_method": "cart",
        "slices": [
            {"sources": [{"model": name, "layer_range": [n, n + 1]} for name in group]}
            for n, group in enumerate(groups)
        ],
        **more,
    }


def test_each_slice_is_looked_at_by_itself() -> None:
    pairs = slices("ab", "ac", base_model="a", parameters={"t": 0.5}, merge_method="slerp")
    assert one(pairs, "slerp").error == ""
    assert one(pairs, "linear").error == ""
    three = slices("ab", "abc", base_model="a", parameters={"t": 0.5}, merge_method="slerp")
    assert "exactly 2 inputs for recipe.slices[1]; got 3" in one(three, "slerp").error
    assert one(slices("ab", "c"), "cart").error == ""
    assert "at least two fine-tuned models" in one(slices("a", "b"), "cart").error
    without = one(slices("ab", "bc", base_model="a"), "ties").error
    assert without == "Base input is not present in merge inputs for recipe.slices[1]"


def test_the_given_recipe_is_not_changed() -> None:
    before = repr(RECIPE)
    variants(RECIPE, ["cart", "linear", "task_arithmetic"])
    assert repr(RECIPE) == before


def test_local_models_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    recipe = {
        "merge_method": "linear",
        "models": [{"model": "a"}, {"model": "org/name"}, {"model": "a+a"}],
        "base_model": "a",
    }
    made = absolute(MergeConfiguration.model_validate(recipe))
    assert made["base_model"] == f"{tmp_path}/a"
    assert [entry["model"] for entry in made["models"]] == [
        f"{tmp_path}/a",
        "org/name",
        f"{tmp_path}/a+{tmp_path}/a",
    ]


def test_paths_through_a_link_stay_those_of_the_folder_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there" / "model").mkdir(parents=True)
    (tmp_path / "there" / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "sub")
    recipe = {"merge_method": "linear", "models": [{"model": "link/../model"}]}
    (made,) = absolute(MergeConfiguration.model_validate(recipe))["models"]
    assert Path(made["model"]).samefile(tmp_path / "there" / "model")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("cart", "is not of the form"),
        ("cart.lambda", "is not of the form"),
        ("cart.lambda=", "is not of the form"),
        ("crat.lambda=1", "did you mean cart?"),
        ("cart.lamda=1", "did you mean lambda?"),
        ("cart.lambda=[1", "is not a value"),
        ("cart.rank_ratio=2", "must lie between 0 and 1"),
        ("ties.density=much", "is refused"),
    ],
)
def test_wrong_assignments_are_named(text: str, reason: str) -> None:
    with pytest.raises(CartError, match=reason.replace("?", r"\?")):
        parse_assignment(text, single=True)


def test_settings_for_methods_that_are_not_compared_are_named() -> None:
    fixed = [parse_assignment("ties.density=0.3", single=True)]
    with pytest.raises(CartError, match="ties is not compared"):
        variants(RECIPE, ["cart"], fixed)
    with pytest.raises(CartError, match="given twice"):
        variants(RECIPE, ["ties"], fixed, fixed)
