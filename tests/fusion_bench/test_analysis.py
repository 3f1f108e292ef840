"""The report of a pool's models: what `mergekit-cart inspect` says of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("fusion_bench")

from fusion_bench.modelpool import BaseModelPool
from torch import nn

from cart_plugin.errors import CartError
from cart_plugin.fusion_bench.analysis import CartAnalysisAlgorithm
from cart_plugin.inspect import inspect_state_dicts
from tests.fusion_bench import pools
from tests.fusion_bench.test_cart import models, states
from tests.fusion_bench.test_program import run


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@pytest.mark.parametrize("has_pretrained", [True, False])
def test_the_report_says_what_the_models_state_dicts_say(
    tmp_path: Path, has_pretrained: bool
) -> None:
    held = models(3)
    base = held["_pretrained_"]
    if not has_pretrained:
        del held["_pretrained_"]
    pool = BaseModelPool(dict(held))
    returned = CartAnalysisAlgorithm(output_path=str(tmp_path)).run(pool)
    assert isinstance(returned, nn.Module)
    found = report(tmp_path)
    assert list(found["models"]) == list(states(held))
    assert (found["base"] == "_pretrained_") is has_pretrained
    rows = inspect_state_dicts(
        states(held), base=dict(base.state_dict()) if has_pretrained else None
    )
    moved = {
        row["tensor"]: row["moved"] for row in rows if row["model"] == next(iter(states(held)))
    }
    records = [record for record in found["records"] if record["decomposed"]]
    assert {record["tensor"]: record["moved"][0] for record in records} == moved
    recipe = found["advice"]["recipe"]
    chosen = "cart/auto" if found["advice"]["method"].startswith("cart_auto") else "simple_average"
    assert recipe.startswith(f"fusion_bench method={chosen}  #")
    reasons = "\n".join(found["advice"]["reasons"])
    # Of random models it is doubted that they have a base in common, too.
    asked = "with the base model (_pretrained_ in the pool)" in reasons
    assert asked is not has_pretrained
    assert "mergekit-cart" not in (tmp_path / "report.md").read_text()
    assert "--base" not in reasons
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "report.md").exists()


def test_gpt2s_layers_are_judged_by_what_they_multiply(tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    held = {name: nn.Sequential(Conv1D(24, 32)) for name in ("_pretrained_", "a", "b", "c")}
    CartAnalysisAlgorithm(output_path=str(tmp_path)).run(BaseModelPool(dict(held)))
    (record,) = [record for record in report(tmp_path)["records"] if record["decomposed"]]
    dicts = {name: one.state_dict() for name, one in held.items()}
    base = dicts.pop("_pretrained_")
    rows = inspect_state_dicts(dicts, base=base, turned=["0.weight"])
    lost = record["methods"]["average"]["lost"]
    assert lost == [row["lost average"] for row in rows]
    as_stored = inspect_state_dicts(dicts, base=base)
    assert lost != pytest.approx([row["lost average"] for row in as_stored], rel=1e-3)


def test_models_are_left_as_they_are(tmp_path: Path) -> None:
    held = models(3)
    before = {
        name: {key: t.clone() for key, t in one.items()} for name, one in states(held).items()
    }
    CartAnalysisAlgorithm(output_path=str(tmp_path)).run(held)
    for name, one in states(held).items():
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in one.items())


def test_too_few_models_and_a_pretrained_one_of_another_kind_are_refused(tmp_path: Path) -> None:
    method = CartAnalysisAlgorithm(output_path=str(tmp_path / "out"))
    with pytest.raises(CartError, match="two models or more, got 1"):
        method.run(models(1))
    with pytest.raises(CartError, match="the base model lacks"):
        method.run(BaseModelPool({**models(2), "_pretrained_": nn.Linear(2, 2)}))
    assert not (tmp_path / "out").exists()


def test_there_is_nothing_to_save(tmp_path: Path) -> None:
    method = CartAnalysisAlgorithm(output_path=str(tmp_path / "out"))
    method._program = SimpleNamespace(merged_model_save_path="merged")
    with pytest.raises(CartError, match="cart/analysis merges nothing"):
        method.run(models(2))


def test_without_a_folder_it_says_so() -> None:
    with pytest.raises(CartError, match="output_path"):
        CartAnalysisAlgorithm().run(models(2))


@pytest.mark.slow
def test_the_program_saves_the_report_beside_its_log(tmp_path: Path) -> None:
    done = run(tmp_path / "work", pools.dinov2_pools(tmp_path), "method=cart/analysis")
    assert done.code == 0, done.output
    (found,) = (tmp_path / "work").rglob("report.html")
    assert set(report(found.parent)["models"]) == set(pools.TASKS)
