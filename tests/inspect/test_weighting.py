"""Weights: of a recipe, as mergekit resolves them, and of Python's callers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from cart_plugin import CartError, CartSettings, merge_state_dicts
from cart_plugin.execution.subjects import subjects
from cart_plugin.inspect import inspect_models, inspect_state_dicts
from cart_plugin.inspect.merges import MERGED
from cart_plugin.inspect.state_dicts import records_of
from cart_plugin.mergekit import register
from tests.inspect.conftest import report, tune

Run = Callable[..., Result]
WEIGHTS = [3.0, 1.0, 0.5]
# A filter, a gradient along the layers, and a number.
WRITTEN: list[Any] = [
    [{"filter": "mlp", "value": 2.0}, {"value": [1.0, 3.0]}],
    [0.5, 2.0],
    1.5,
]


def save_recipe(path: Path, models: list[Any], written: list[Any], **others: Any) -> Path:
    listed = [
        {"model": str(model), **({} if weight is None else {"parameters": {"weight": weight}})}
        for model, weight in zip(models, written, strict=True)
    ]
    path.write_text(yaml.safe_dump({"merge_method": "cart", "models": listed, **others}))
    return path


def kept(found: Any) -> dict[str, list[float]]:
    return {method: list(judged.kept) for method, judged in found.judgements().items()}


def states(models: list[Path]) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / "model.safetensors") for folder in models]


@pytest.mark.parametrize("with_base", [True, False])
def test_what_is_foretold_is_what_merges_with_the_same_weights_keep(
    models: list[Path], base: Path, with_base: bool
) -> None:
    dicts = states(models)
    start = load_file(base / "model.safetensors") if with_base else None
    auto = CartSettings(lambda_="auto")
    merges = {
        "average": merge_state_dicts(dicts, CartSettings(rank_ratio=0), weights=WEIGHTS),
        "cart": merge_state_dicts(dicts, weights=WEIGHTS),
        "cart_auto": merge_state_dicts(dicts, auto, weights=WEIGHTS),
    }
    if start is not None:
        informed = merge_state_dicts(dicts, auto, weights=WEIGHTS, base=start)
        merges["cart_auto with base"] = informed
    for method, merged in merges.items():
        rows = inspect_state_dicts(dicts, base=start, merged=merged, weights=WEIGHTS)
        for row in rows:
            for kind in ("kept", "lost"):
                found, expected = row[f"{kind} {method}"], row[f"{kind} {MERGED}"]
                assert found == pytest.approx(expected, rel=2e-3, abs=2e-4), (method, row["tensor"])
    equal = inspect_state_dicts(dicts, base=start)
    assert rows[0]["kept cart"] != pytest.approx(equal[0]["kept cart"], rel=1e-2)
    assert [row["weight"] for row in rows[:3]] == pytest.approx([2.0, 2 / 3, 1 / 3], rel=1e-5)


def test_adapters_say_what_whole_models_of_the_same_weights_say(
    adapters: list[Path], base: Path
) -> None:
    from tests.adapters.lora import state

    dicts = [state(base, folder) for folder in adapters]
    start = state(base)
    changed = [name for name in start if name.endswith(("q_proj.weight", "v_proj.weight"))]
    dicts, (start,) = (
        [{name: own[name] for name in changed} for own in group] for group in (dicts, [start])
    )
    whole = {row["tensor"]: row for row in inspect_state_dicts(dicts, base=start, weights=WEIGHTS)}
    rows = {row["tensor"]: row for row in inspect_models(adapters, weights=WEIGHTS).rows()}
    assert rows.keys() == whole.keys()
    for name, row in rows.items():
        for key in ("kept average", "kept cart", "lost cart_auto", "lost cart_auto with base"):
            assert row[key] == pytest.approx(whole[name][key], rel=5e-3, abs=1e-3), (name, key)
        assert row["weight"] == whole[name]["weight"]


def test_a_recipes_filters_and_gradients_are_what_mergekit_makes_of_them(
    run: Run, models: list[Path], base: Path, tmp_path: Path
) -> None:
    register()
    recipe = save_recipe(tmp_path / "r.yaml", models, WRITTEN, parameters={"rank_ratio": 0.08})
    merged = tmp_path / "merged"
    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text())),
        str(merged),
        MergeOptions(write_model_card=False, copy_tokenizer=False),
    )
    run(recipe, "--base", base, "--merged", merged, "--out", tmp_path / "out")
    found = report(tmp_path / "out")
    for record in filter(lambda record: record["decomposed"], found["records"]):
        methods = record["methods"]
        expected = pytest.approx(methods[MERGED]["kept"], rel=2e-3, abs=2e-4)
        assert methods["cart"]["kept"] == expected, record["tensor"]
    weights = {record["tensor"]: record.get("weights") for record in found["records"]}
    scale = 3 / (3.0 + 2.0 + 1.5)
    last = [3.0 * scale, 2.0 * scale, 1.5 * scale]
    assert weights["model.layers.1.self_attn.q_proj.weight"] == pytest.approx(last, rel=1e-5)
    scale = 3 / (2.0 + 0.5 + 1.5)
    first = [2.0 * scale, 0.5 * scale, 1.5 * scale]
    assert weights["model.layers.0.mlp.up_proj.weight"] == pytest.approx(first, rel=1e-5)


def test_the_recommended_recipe_has_the_recipes_weights(
    run: Run, models: list[Path], base: Path, tmp_path: Path
) -> None:
    common = {"weight": [{"filter": "q_proj", "value": 2.0}, {"value": 1.0}], "rank": 3}
    recipe = save_recipe(tmp_path / "r.yaml", models, [*WRITTEN[:2], None], parameters=common)
    text = run(recipe, "--base", base, "--out", tmp_path / "out").output
    advised = yaml.safe_load(report(tmp_path / "out")["advice"]["recipe"])
    own = [entry.get("parameters") for entry in advised["models"]]
    assert own == [{"weight": WRITTEN[0]}, {"weight": WRITTEN[1]}, None]
    assert advised["parameters"] == {"weight": common["weight"]}
    assert "weights, 1 on average" in text
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(advised))
    names = [f"model.layers.{number}.self_attn.q_proj.weight" for number in range(2)]
    first, second = (subjects(path, None).weighting for path in (recipe, again))
    assert first is not None
    assert second is not None
    assert first.of(names) == second.of(names)


def test_equal_weights_are_no_news(
    run: Run, models: list[Path], base: Path, tmp_path: Path
) -> None:
    recipe = save_recipe(tmp_path / "r.yaml", models, [0.3, 0.3, 0.3])
    text = run(recipe, "--base", base).output
    assert text == run(*models, "--base", base).output
    assert "weights, 1 on average" not in text


def test_weight_files_of_mergekit_pytorch_know_no_layers(
    models: list[Path], tmp_path: Path
) -> None:
    files = [folder / "model.safetensors" for folder in models]
    weighting = subjects(save_recipe(tmp_path / "r.yaml", files, WRITTEN), None).weighting
    assert weighting is not None
    name = "model.layers.1.self_attn.q_proj.weight"
    assert weighting.of([name]) == {name: [1.0, 0.5, 1.5]}


def test_gradients_of_adapters_go_along_the_bases_layers(
    run: Run, base: Path, tmp_path: Path
) -> None:
    from tests.adapters.lora import save_loras

    folders = save_loras(tmp_path / "adapters", base, layers_to_transform=[0])
    listed = [f"{base}+{folder}" for folder in folders]
    run(save_recipe(tmp_path / "r.yaml", listed, [[1.0, 5.0], 1.0, 1.0]), "--out", tmp_path / "o")
    assert {tuple(record["weights"]) for record in report(tmp_path / "o")["records"]} == {
        (1.0, 1.0, 1.0)
    }


def test_other_weights_are_measured_anew(models: list[Path], tmp_path: Path) -> None:
    before = inspect_models(models, weights=WEIGHTS, out=tmp_path).rows()
    assert inspect_models(models, weights=[6, 2, 1], out=tmp_path).rows() == before
    assert inspect_models(models, out=tmp_path).rows() != before


def test_a_weight_below_zero_leaves_out_what_does_not_take_it(
    models: list[Path], base: Path
) -> None:
    found = inspect_models(models, base=base, weights=[1, 1, -0.5])
    assert kept(found).keys() == {"average", "task_arithmetic", "cart"}
    assert "which cart_auto does not take" in "\n".join(found.advice().reasons)
    assert found.advice().method in ("average", "cart")
    dicts = states(models)
    merged = merge_state_dicts(dicts, weights=[1, 1, -0.5])
    (record, *_) = [
        record
        for record in records_of(
            dict(zip("abc", dicts, strict=True)), merged=merged, weights=[1, 1, -0.5]
        )
        if record["decomposed"]
    ]
    methods = record["methods"]
    assert methods["cart"]["kept"] == pytest.approx(methods[MERGED]["kept"], rel=2e-3, abs=2e-4)


def test_where_few_models_count_cart_auto_takes_the_base(
    run: Run, base: Path, tmp_path: Path
) -> None:
    folders = [tune(base, tmp_path / f"m{seed}", seed) for seed in range(5)]
    only = [{"filter": "mlp", "value": 0.0}, {"value": 1.0}]
    recipe = save_recipe(tmp_path / "r.yaml", folders, [only, None, None, None, None])
    run(recipe, "--base", base, "--out", tmp_path / "out")
    found = report(tmp_path / "out")
    assert "cart_auto with base" in found["methods"]
    held = {
        record["module"].split(".")[0]: "cart_auto with base" in record["methods"]
        for record in found["records"]
        if record["decomposed"]
    }
    assert held == {"mlp": True, "self_attn": False}
    page = (tmp_path / "out" / "report.html").read_text()
    drawn = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert all("cart_auto with base" in record["methods"] for record in drawn["records"])


def test_weights_that_are_none_are_refused(run: Run, models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CartError, match="3 models but 2 weights"):
        inspect_models(models, weights=[1, 2])
    with pytest.raises(CartError, match="must sum to more than 0"):
        inspect_models(models, weights=[1, -1, 0])
    for written, message in {
        "much": "weight must be a number, got 'much'",
        float("inf"): "weight must be a finite number",
    }.items():
        result = run(save_recipe(tmp_path / "r.yaml", models, [written, 1.0, 1.0]))
        assert result.exit_code == 1
        assert message in result.output
        assert len(result.output.strip().splitlines()) == 1
    zero = save_recipe(tmp_path / "r.yaml", models, [{"filter": "mlp", "value": 0.0}] * 3)
    assert "model.layers.0.mlp.down_proj.weight" in run(zero).output
