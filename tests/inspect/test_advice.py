"""Which method is recommended, and what is said of it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from cart_plugin.inspect.advice import Advice, advise
from cart_plugin.inspect.summary import Judgement, Movement, Pair

LOSSES = {
    "average": 0.6,
    "task_arithmetic": 0.5,
    "cart": 0.4,
    "cart_auto": 0.3,
    "cart_auto with base": 0.2,
}


def advice(
    losses: dict[str, float] = LOSSES,
    *,
    count: int = 3,
    base: str | None = "base",
    rank: int | None = None,
    of_adapters: bool = False,
    apart: float = 1.2,
    cosine: float = 0.1,
    share: float | None = 0.01,
    kept: float = 0.8,
    paths: list[str] | None = None,
) -> Advice:
    names = [f"model{index}" for index in range(count)]
    moved = [Movement(name, 1.0, share, {}, [], rank, 20.0, 0.8) for name in names]
    pairs = [Pair((names[0], names[1]), apart, cosine, 0.3, 0.3)]
    judged = {name: Judgement([kept] * count, [loss] * count) for name, loss in losses.items()}
    return advise(moved, pairs, judged, paths or names, base, of_adapters=of_adapters)


def without(*methods: str) -> dict[str, float]:
    return {name: loss for name, loss in LOSSES.items() if name not in methods}


def said(found: Advice) -> str:
    return "\n".join(found.reasons)


def test_with_a_base_it_is_cart_auto_with_it() -> None:
    found = advice()
    assert found.method == "cart_auto with base"
    recipe = yaml.safe_load(found.recipe)
    assert recipe["merge_method"] == "cart_auto"
    assert recipe["base_model"] == "base"


def test_of_many_models_cart_auto_leaves_the_base_out() -> None:
    found = advice(without("cart_auto with base"), count=6)
    assert found.method == "cart_auto"
    assert "base_model" not in yaml.safe_load(found.recipe)
    assert "around their average" in said(found)


def test_without_a_base_the_base_is_asked_for() -> None:
    found = advice(without("cart_auto with base", "task_arithmetic"), base=None)
    assert found.method == "cart_auto"
    assert "--base" in said(found)
    assert "the average itself keeps none of it" in said(found)


def test_two_models_without_their_base_are_averaged() -> None:
    found = advice({"average": 1.0}, count=2, base=None)
    assert found.method == "average"
    recipe = yaml.safe_load(found.recipe)
    assert (recipe["merge_method"], recipe["parameters"]) == ("linear", {"weight": 1.0})
    assert "two models around their average are the average" in said(found)
    little = advice({"average": 1.0}, count=2, base=None, kept=0.0)
    assert "compress" not in said(little)
    assert "keeps 0%" not in said(little)


def test_of_two_models_with_their_base_the_other_methods_are_told_to_be_the_average() -> None:
    found = advice(without("cart", "cart_auto"), count=2)
    assert found.method == "cart_auto with base"
    assert "cart, and cart_auto without the base, are no others" in said(found)
    assert "around their average" not in said(advice())


def test_folders_are_written_as_mergekit_has_to_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "math").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    paths = ["models/math", str(tmp_path / "models"), "org/name+models/math"]
    recipe = yaml.safe_load(advice(paths=paths, base="models").recipe)
    written = [entry["model"] for entry in recipe["models"]]
    assert written == ["./models/math", paths[1], "org/name+./models/math"]
    assert recipe["base_model"] == "./models"


def test_where_nothing_is_to_be_gained_the_average_will_do() -> None:
    found = advice({**LOSSES, "average": 0.205})
    assert found.method == "average"
    assert "no method loses clearly less" in said(found)


def test_a_base_of_other_models_is_doubted_where_all_moved_far_and_alike() -> None:
    found = said(advice(share=0.48, cosine=0.96, apart=0.27))
    assert "model0 by 48%" in found
    assert "if base is not the model that they were fine-tuned from" in found
    assert "count twice" not in found
    assert "count twice" in said(advice(share=0.02, cosine=0.96, apart=0.27))
    assert "fine-tuning moves" not in said(advice(share=0.3, cosine=0.3))


def test_a_negative_weight_leaves_the_average() -> None:
    found = said(advice({"average": 2.6, "task_arithmetic": 0.9}, count=2))
    assert "a weight is below 0, which cart_auto does not take" in found
    assert "of the methods that can be recommended the average is left" in found
    assert "loses less by this measure (90%)" in found


@pytest.mark.parametrize("ahead", ["cart", "task_arithmetic"])
def test_that_no_method_is_better_is_said_where_none_is(ahead: str) -> None:
    found = advice({"average": 0.5, ahead: 0.2, "cart_auto with base": 0.5, "cart_auto": 0.5})
    assert found.method == "average"
    assert "no method loses" not in said(found)
    assert "cart_auto with base does not lose clearly less than the average" in said(found)
    assert "loses less by this measure (20%)" in said(found)


def test_a_method_that_is_ahead_by_the_measure_is_told() -> None:
    found = advice({**LOSSES, "cart_auto": 0.1})
    assert found.method == "cart_auto with base"
    assert "cart_auto loses less by this measure (10%): judge both" in said(found)
    assert "drawn at random" in said(advice({**LOSSES, "cart": 0.1}, rank=16))
    assert "judge both" not in said(advice())


@pytest.mark.parametrize(("kept", "told"), [(0.8, False), (0.4, True)])
def test_where_merges_keep_little_compression_is_told(kept: float, told: bool) -> None:
    assert ("mergekit-cart compress" in said(advice(kept=kept))) is told


def test_low_ranks_and_twins_are_told() -> None:
    assert "of rank 16, as of LoRA" in said(advice(rank=16))
    assert "rank" not in said(advice())
    assert "differ by 3% of what they moved" in said(advice(apart=0.03))
    assert "count twice" not in said(advice())


@pytest.mark.parametrize("base", ["other", None])
def test_models_that_moved_further_than_fine_tuning_does_are_told(base: str | None) -> None:
    """From another base all move alike: they are not called one and the same."""
    text = said(advice(share=1.4, apart=0.03, base=base))
    assert "model0 by 140%, model1 by 140%, model2 by 140% of the weights" in text
    assert "count twice" not in text
    assert ("if other is not the model that they were fine-tuned from" in text) is (
        base is not None
    )
    assert "of the weights" not in said(advice(share=None))


@pytest.mark.parametrize(("base", "told"), [("sibling", True), (None, False)])
def test_a_sibling_as_the_base_is_suspected(base: str | None, told: bool) -> None:
    text = said(advice(apart=1.0, cosine=0.5, base=base))
    assert ("all models moved from sibling in part alike (cosine 0.50" in text) is told
    assert "in part alike" not in said(advice(apart=0.2, cosine=0.98))  # one and the same
    assert "in part alike" not in said(advice(cosine=0.15))


def test_adapters_alone_get_the_command_for_adapters() -> None:
    found = advice(of_adapters=True, base=None, rank=4, paths=["a b", "c", "d"])
    words = shlex.split(found.recipe)
    assert words[:5] == ["mergekit-cart", "merge-adapters", "a b", "c", "d"]
    assert words[5:] == ["--method", "auto", "--out", "merged"]


def test_of_a_pool_the_command_is_fusion_benchs() -> None:
    names = ["a", "b", "c"]
    moved = [Movement(name, 1.0, 0.01, {}, [], None, 20.0, 0.8) for name in names]
    for losses, method in (
        (LOSSES, "cart/auto"),
        (without("cart_auto", "cart_auto with base"), "cart"),
        ({**LOSSES, "average": 0.2}, "simple_average"),
    ):
        judged = {name: Judgement([0.3] * 3, [loss] * 3) for name, loss in losses.items()}
        found = advise(moved, [], judged, names, None, of_adapters=False, of_pool=True)
        assert shlex.split(found.recipe, comments=True) == ["fusion_bench", f"method={method}"]
        assert "mergekit-cart" not in said(found)
        assert "--base" not in said(found)


def test_models_without_matrices_are_averaged() -> None:
    found = advice({})
    assert found.method == "average"
    assert "none of the weights that moved" in said(found)
