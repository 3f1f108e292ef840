"""What doctor says about a recipe itself: its form, keys, parameters, and groups of models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml

from cart_plugin.doctor.recipe import example_recipes
from tests.doctor.conftest import Report
from tests.doctor.tiny import write_recipe


@pytest.fixture
def check(
    doctor: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> Callable[..., Report]:
    """Doctor on a recipe for three Llama models with the given keys."""

    def check(**recipe: Any) -> Report:
        return doctor(write_recipe(tmp_path / "cart.yaml", llamas, **recipe))

    return check


def entries(models: list[str], *parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """A recipe's `models`, the first ones with parameters."""
    padded = [*parameters, *[{}] * (len(models) - len(parameters))]
    return [{"model": model, "parameters": own} for model, own in zip(models, padded, strict=True)]


def test_a_good_recipe_has_no_problems(check: Callable[..., Report]) -> None:
    report = check(parameters={"rank_ratio": 0.1, "lambda": 1.5})
    report.is_clean()
    assert "valid for mergekit-yaml, merge_method cart" in report.text
    assert "35 decomposed, 13 averaged (rank_ratio 0.1, lambda 1.5)" in report.text


def test_a_recipe_without_hyperparameters(check: Callable[..., Report]) -> None:
    report = check(merge_method="cart_auto")
    report.is_clean()
    assert "35 decomposed, 13 averaged (rank_ratio 0.16)" in report.text
    report = check(merge_method="cart_auto", parameters={"weight": -0.5})
    assert "parameters.weight is -0.5: cart_auto takes no negative weights" in report.text
    report = check(merge_method="cart_auto", parameters={"lambda": 0.3})
    report.has_only_warning("parameters.lambda is ignored", "not of cart_auto")


def test_missing_recipe_file(doctor: Callable[..., Report], tmp_path: Path) -> None:
    doctor(tmp_path / "none.yaml").has_only_problem("FileNotFoundError", "name a YAML file")


def test_binary_file_is_no_recipe(doctor: Callable[..., Report], tmp_path: Path) -> None:
    (tmp_path / "cart.yaml").write_bytes(b"\xff\xfe\x00")
    doctor(tmp_path / "cart.yaml").has_only_problem("cannot be read")


def test_invalid_yaml_names_the_line(doctor: Callable[..., Report], tmp_path: Path) -> None:
    (tmp_path / "cart.yaml").write_text("merge_method: cart\nmodels: [a, b\n")
    doctor(tmp_path / "cart.yaml").has_only_problem("not valid YAML: line 3")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "cart"])
def test_yaml_that_is_no_recipe(text: str, doctor: Callable[..., Report], tmp_path: Path) -> None:
    (tmp_path / "cart.yaml").write_text(text)
    doctor(tmp_path / "cart.yaml").has_only_problem("not a recipe", str(example_recipes()))


def test_mergekits_own_refusal_is_passed_on(check: Callable[..., Report]) -> None:
    check(tokenizer_source="union", tokenizer={"source": "union"}).has_only_problem(
        "mergekit rejects the recipe", "Cannot specify both"
    )


def test_a_parameter_of_the_wrong_form(check: Callable[..., Report]) -> None:
    report = check(parameters={"rank_ratio": [[0.1]]})
    report.has_only_problem("parameters.rank_ratio: must be a value, a gradient")


def test_unknown_method_is_suggested(check: Callable[..., Report]) -> None:
    check(merge_method="carts").has_only_problem("carts", "did you mean cart?")


def test_unlike_method_gets_the_list(check: Callable[..., Report]) -> None:
    check(merge_method="qqq").has_only_problem("choose one of", "cart,", "ties")


def test_no_method(check: Callable[..., Report]) -> None:
    check(merge_method=None).has_only_problem("no merge_method", "merge_method: cart")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("rank_rati", "did you mean rank_ratio?"),
        ("lamda", "lambda?"),
        ("zzz", "cart has rank_ratio"),
    ],
)
def test_unknown_parameter_of_the_recipe(
    name: str, advice: str, check: Callable[..., Report]
) -> None:
    check(parameters={name: 1}).has_only_problem(f"parameters.{name} is unknown", advice)


def test_unknown_parameter_of_a_model(check: Callable[..., Report], llamas: list[str]) -> None:
    report = check(models=entries(llamas, {}, {"wieght": 1}))
    report.has_only_problem("models[1].parameters.wieght is unknown", "did you mean weight?")


def sliced(llamas: list[str], **keys: Any) -> dict[str, Any]:
    sources = [{"model": model, "layer_range": [0, 5]} for model in llamas]
    return {"models": None, "slices": [{"sources": sources, **keys}]}


def test_unknown_parameter_of_a_slice(check: Callable[..., Report], llamas: list[str]) -> None:
    report = check(**sliced(llamas, parameters={"energi": 0.5}))
    report.has_only_problem("slices[0].parameters.energi is unknown", "did you mean energy?")


def test_unknown_parameter_of_a_source(check: Callable[..., Report], llamas: list[str]) -> None:
    recipe = sliced(llamas)
    recipe["slices"][0]["sources"][2]["parameters"] = {"weigth": 1}
    report = check(**recipe)
    report.has_only_problem("slices[0].sources[2].parameters.weigth", "did you mean weight?")


def test_unknown_parameter_of_a_module(check: Callable[..., Report], llamas: list[str]) -> None:
    module = {"models": [{"model": model} for model in llamas], "parameters": {"svdd": "exact"}}
    report = check(models=None, modules={"default": module})
    report.has_only_problem("modules.default.parameters.svdd", "did you mean svd?")


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [("parametrs", {"rank": 1}, "did you mean parameters?"), ("dtyp", "float32", "dtype?")],
)
def test_unknown_key_of_the_recipe(
    key: str, value: object, advice: str, check: Callable[..., Report]
) -> None:
    check(**{key: value}).has_only_problem(f"{key} is unknown and would be ignored", advice)


def test_unknown_keys_deeper_down(check: Callable[..., Report], llamas: list[str]) -> None:
    recipe = sliced(llamas, parameter={})
    recipe["slices"][0]["sources"][0]["layers"] = [0, 1]
    problems = check(**recipe).problems
    assert any("slices[0].parameter is unknown" in problem for problem in problems)
    assert any("slices[0].sources[0].layers is unknown" in problem for problem in problems)
    assert len(problems) == 2


def test_parameter_outside_of_parameters(check: Callable[..., Report]) -> None:
    check(rank_ratio=0.1).has_only_problem("rank_ratio is a parameter", "under `parameters:`")


def test_misspelt_filter_would_match_everything(check: Callable[..., Report]) -> None:
    setting = [{"value": 0.1, "filter": "mlp"}, {"value": 0.2, "filtr": "self_attn"}]
    report = check(parameters={"rank_ratio": setting})
    report.has_only_problem("parameters.rank_ratio[1].filtr is unknown", "did you mean filter?")


def test_entries_after_the_one_without_filter(check: Callable[..., Report]) -> None:
    setting = [{"value": 0.1}, {"value": 0.2, "filter": "mlp"}]
    report = check(parameters={"rank_ratio": setting})
    report.has_only_problem("parameters.rank_ratio[0] has no filter", "make it the last one")


def test_parameters_of_other_methods_are_only_a_warning(
    check: Callable[..., Report], llamas: list[str]
) -> None:
    check(parameters={"normalize": True}).has_only_warning("not of cart", "dare_linear")
    report = check(models=entries(llamas, {"density": 0.5}))
    report.has_only_warning("models[0].parameters.density is ignored")


def test_a_ties_recipe_passes_with_only_the_method_changed(
    check: Callable[..., Report], llamas: list[str]
) -> None:
    models = entries(llamas[:2], *[{"weight": 0.5, "density": 0.5}] * 2) + entries(llamas[2:])
    report = check(
        models=models, base_model=llamas[2], parameters={"normalize": True, "int8_mask": True}
    )
    assert report.exit_code == 0
    assert len(report.warnings) == 5  # four parameters and two models


def test_shared_parameter_under_a_model(check: Callable[..., Report], llamas: list[str]) -> None:
    report = check(models=entries(llamas, {"rank_ratio": 0.1}))
    report.has_only_problem("models[0].parameters.rank_ratio is ignored", "move it to the recipe's")


def test_weight_of_the_base_model(
    check: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    base = shutil.copytree(llamas[0], tmp_path / "base").as_posix()
    models = entries([*llamas, base], {}, {}, {}, {"weight": 1})
    report = check(models=models, base_model=base)
    report.has_only_warning("models[3].parameters.weight is ignored", "base model", "delete it")


def test_two_models_are_a_warning(check: Callable[..., Report], llamas: list[str]) -> None:
    two: dict[str, Any] = {"models": entries(llamas[:2])}
    report = check(**two)
    report.has_only_warning("with two models cart is plain averaging", "cart_auto with their base")
    report = check(**two, base_model=llamas[2])
    report.has_only_warning(
        "with two models cart is plain averaging", "merge_method: cart_auto, or"
    )
    two["merge_method"] = "cart_auto"
    report = check(**two)
    report.has_only_warning("with two models cart_auto is plain averaging", "name their base model")
    check(**two, base_model=llamas[2]).is_clean()
    report = check(**two, base_model=llamas[2], parameters={"center": "average"})
    report.has_only_warning("cart_auto is plain averaging", "delete center: average")


def test_two_models_around_a_base_are_fine(check: Callable[..., Report], llamas: list[str]) -> None:
    check(
        models=entries(llamas[:2]), base_model=llamas[2], parameters={"center": "base"}
    ).is_clean()


@pytest.mark.parametrize("base", [False, True])
def test_one_model_is_a_problem(
    base: bool, check: Callable[..., Report], llamas: list[str]
) -> None:
    models = entries(llamas[:2] if base else llamas[:1])
    report = check(models=models, base_model=llamas[1] if base else None)
    report.has_only_problem("1 fine-tuned model; cart needs at least two", "add models")


def test_a_model_named_twice(check: Callable[..., Report], llamas: list[str]) -> None:
    check(models=entries([*llamas, llamas[0]])).has_only_problem("names a model twice")


def test_center_base_of_cart_auto(check: Callable[..., Report], llamas: list[str]) -> None:
    models = entries(llamas[:2])
    recipe = {"models": models, "base_model": llamas[2], "merge_method": "cart_auto"}
    report = check(**recipe, parameters={"center": "base"})
    assert "center is the base model: cart_auto adds its sum to that" in report.text
    assert "shows where the tasks' inputs lie" not in report.text
    assert "shows where the tasks' inputs lie" in check(**recipe).text


def test_center_base_without_base(check: Callable[..., Report]) -> None:
    report = check(parameters={"center": "base"})
    report.has_only_problem("center is base, but there is no base model", "base_model")


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [("bf16", "did you mean bfloat16?"), ("floot32", "float32?"), ("int8", "use one of")],
)
def test_dtype_that_mergekit_does_not_know(
    dtype: str, advice: str, check: Callable[..., Report]
) -> None:
    check(out_dtype=dtype).has_only_problem(f"out_dtype: mergekit cannot merge in {dtype}", advice)


def test_recipes_of_other_methods_are_checked_too(
    check: Callable[..., Report], llamas: list[str]
) -> None:
    models = entries(llamas, *[{"weight": 1.0}] * 3)
    report = check(merge_method="linear", models=models)
    report.is_clean()
    assert "48 tensors merged with linear" in report.text
    report = check(merge_method="linear", models=models, parameters={"rank_ratio": 0.1})
    report.has_only_warning("a parameter of cart, cart_auto, not of linear")


def test_methods_that_need_a_base_model(check: Callable[..., Report], llamas: list[str]) -> None:
    models = entries(llamas, *[{"weight": 1.0}] * 3)
    report = check(merge_method="ties", models=models)
    report.has_only_problem("ties needs a base model", "base_model")


def test_several_recipes_are_checked_one_by_one(
    doctor: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    models = entries(llamas)
    first = {"name": "first", "merge_method": "cart", "models": models}
    last = {
        "merge_method": "cart",
        "models": [{"model": "first"}, *models],
        "parameters": {"rnk": 2},
    }
    file = tmp_path / "multi.yaml"
    file.write_text(yaml.safe_dump_all([first, last]))
    report = doctor(file)
    report.has_only_problem("parameters.rnk is unknown", "did you mean rank?")
    assert "2 recipes, for mergekit-multi" in report.text
    assert "model first is made by another recipe of this file" in report.text

    file.write_text(yaml.safe_dump_all([first, {**last, "name": "first", "parameters": {}}]))
    doctor(file).has_only_problem("share a name")


@pytest.mark.parametrize(
    "parameters", [{"rank_ratio": 0.1}, {"rank_ratio": 2}, {"rank": 4, "energy": 0.9}]
)
def test_doctor_and_mergekit_agree(
    parameters: dict[str, Any],
    check: Callable[..., Report],
    tmp_path: Path,
) -> None:
    report = check(parameters=parameters)
    merged = CliRunner().invoke(
        mergekit_yaml, [str(tmp_path / "cart.yaml"), str(tmp_path / "out"), "--no-copy-tokenizer"]
    )
    assert (merged.exit_code == 0) == (report.exit_code == 0)


def test_a_base_that_a_method_does_not_know_is_averaged_in(
    check: Callable[..., Report], llamas: list[str]
) -> None:
    """So it is where `ties` is replaced by `linear`, and all else is left."""
    base, two = llamas[2], entries(llamas[:2])
    for method, parameters in (("linear", {"weight": 1.0}), ("karcher", {})):
        recipe = {"merge_method": method, "models": two, "parameters": parameters}
        report = check(**recipe, base_model=base)
        report.has_only_warning("would be averaged in", f"{method} knows no base", "delete `base_m")
        check(**recipe).is_clean()
        check(**{**recipe, "models": entries(llamas)}, base_model=base).is_clean()
    sources = [{"model": model, "layer_range": [0, 5]} for model in llamas[:2]]
    slices = {"models": None, "slices": [{"sources": sources}], "base_model": base}
    check(**slices, merge_method="linear", parameters={"weight": 1.0}).is_clean()


def test_the_weight_that_the_averaged_base_lacks(
    check: Callable[..., Report], llamas: list[str], tmp_path: Path
) -> None:
    models = entries(llamas[:2], {"weight": 0.3}, {"weight": 0.3})
    report = check(merge_method="linear", models=models, base_model=llamas[2])
    (problem,) = report.problems
    assert "Missing required parameter weight" in problem
    assert "-> delete `base_model:`: linear knows no base" in problem
    assert "mergekit-cart merge" not in problem
    report = check(merge_method="linear", models=entries(llamas[:2], {"weight": 0.3}))
    report.has_only_problem("set `weight` under the recipe's `parameters:`, or for each model")
    report = check(merge_method="slerp", models=entries(llamas[:2]), base_model=llamas[0])
    report.has_only_problem("set `t` under the recipe's `parameters:`; of filters")
    one = entries(llamas[:1])
    report = check(merge_method="passthrough", models=one, base_model=llamas[2])
    report.has_only_problem("requires exactly 1 inputs", "delete `base_model:`: passthrough")
