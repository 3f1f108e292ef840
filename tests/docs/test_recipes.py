"""The pages' recipes pass the doctor and merge, as they stand there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from cart_plugin import CartWarning
from cart_plugin.mergekit import register
from tests.docs.pages import all_blocks
from tests.doctor.conftest import Report
from tests.doctor.tiny import load_tensors

register()

DOCUMENTS = [(page, yaml.safe_load(code)) for page, code in all_blocks("yaml")]
RECIPES = [(page, doc) for page, doc in DOCUMENTS if "merge_method" in doc]
# Of adapters: test_merging_adapters.py.
OTHERS = {"merge_method", "_target_", "adapters"}
PARTS = [(page, doc) for page, doc in DOCUMENTS if not OTHERS & set(doc)]
POOLS = [(page, doc) for page, doc in DOCUMENTS if "_target_" in doc]
MINIMAL = {
    "models": [{"model": f"./models/{name}"} for name in ("math", "code", "german")],
    "merge_method": "cart",
}


def named(found: list[tuple[str, dict]]) -> list:
    return [pytest.param(doc, id=f"{page}-{i}") for i, (page, doc) in enumerate(found)]


@pytest.mark.parametrize(
    "document", [*named(RECIPES), *named([(page, MINIMAL | doc) for page, doc in PARTS])]
)
def test_recipes_pass_the_doctor_and_merge(
    document: dict, here: Path, doctor: Callable[..., Report]
) -> None:
    recipe = here / "cart.yaml"
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    report = doctor(recipe)
    if any("+" in entry["model"] for entry in document.get("models", ())):
        report.has_only_warning("--lora-merge-cache")  # an option of the command, not of a recipe
    else:
        report.is_clean()
    options = MergeOptions(
        quiet=True,
        copy_tokenizer=False,
        write_model_card=False,
        lora_merge_cache=str(here / "fused"),
    )
    run_merge(MergeConfiguration.model_validate(document), str(here / "merged"), options)
    merged = load_tensors(here / "merged")
    assert set(merged) == set(load_tensors(here / "models" / "base"))
    assert all(torch.isfinite(tensor).all() for tensor in merged.values())


def test_there_are_recipes_to_test() -> None:
    assert len([page for page, _ in RECIPES if page == "README.md"]) == 2
    assert PARTS
    assert POOLS


def test_recipes_of_the_front_page_differ_from_the_average(here: Path) -> None:
    mean = torch.stack(
        [
            load_tensors(here / "models" / name)["model.layers.0.mlp.up_proj.weight"]
            for name in ("math", "code", "german")
        ]
    ).mean(0)
    for number, (page, document) in enumerate(RECIPES):
        if page == "README.md":
            options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
            out = here / str(number)
            run_merge(MergeConfiguration.model_validate(document), str(out), options)
            merged = load_tensors(out)["model.layers.0.mlp.up_proj.weight"]
            assert (merged.float() - mean).norm() > 0.1 * mean.norm()


@pytest.mark.parametrize("pool", named(POOLS))
def test_model_pools_are_fusion_benchs(pool: dict) -> None:
    assert pool["_target_"].startswith("fusion_bench.modelpool.")
    assert len(pool["models"]) >= 3


def test_two_models_are_averaged_with_a_warning_as_the_guide_says() -> None:
    from cart_plugin import merge_tensors

    two = [torch.randn(16, 24, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    with pytest.warns(CartWarning):
        assert torch.allclose(merge_tensors(two), (two[0] + two[1]) / 2, atol=1e-6)
