"""Methods that mergekit has not: chosen on a validation split, and merged to folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.common import beside, peers
from tests.doctor.tiny import save_models

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    """A base and two models that were made of it."""
    base, *tuned = map(Path, save_models(tmp_path / "models", "llama", count=3))
    return base, dict(zip(("one", "two"), tuned, strict=True))


def taus(base: Path, tuned: Mapping[str, Path]) -> list[Tensor]:
    start, *states = (load_file(path / beside.WEIGHTS) for path in (base, *tuned.values()))
    return [state[NAME] - start[NAME] for state in states]


def test_no_method_has_more_settings_than_mergekits() -> None:
    assert set(beside.GRIDS) <= set(beside.BESIDE_MERGEKIT)
    assert all(1 <= len(beside.points(method)) <= 8 for method in beside.BESIDE_MERGEKIT)
    names = [beside.slug(method) for method in beside.BESIDE_MERGEKIT]
    assert len(set(names)) == len(names)
    assert not [name for name in names if set(name) & set(" ,")]


def test_merged_models_are_made_once_and_load(
    models: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    base, tuned = models
    chosen = {"ASWUDI": {}, "DC-Merge": {"density": 0.5, beside.SCALE: 1.5}}
    found = beside.merged_models(chosen, list(tuned.values()), base, tmp_path / "beside")
    start = load_file(base / beside.WEIGHTS)[NAME]
    added = {
        "ASWUDI": peers.aswudi(taus(base, tuned)),
        "DC-Merge": 1.5 * peers.dc_merge(taus(base, tuned), density=0.5),
    }
    for method, place in found.items():
        model = AutoModelForCausalLM.from_pretrained(place)
        assert torch.allclose(model.state_dict()[NAME], start + added[method], atol=1e-5), method
    monkeypatch.setattr(beside, "merged_by", None)  # it is not called again
    assert beside.merged_models(chosen, list(tuned.values()), base, tmp_path / "beside") == found
    with pytest.raises(TypeError):  # at other settings it is
        beside.merged_models({"ASWUDI": {"x": 1.0}}, list(tuned.values()), base, tmp_path / "b")


def test_the_best_setting_on_the_validation_split_is_chosen_and_found_again(
    models: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, tuned = models
    start = load_file(base / beside.WEIGHTS)[NAME]
    wanted = torch.linalg.norm(1.3 * peers.dc_merge(taus(base, tuned), density=1e-2))
    judged = []

    def judge(tensors: Mapping[str, Tensor]) -> dict[str, float]:
        judged.append(tensors)
        norm = torch.linalg.norm(tensors[NAME] - start)
        return {"one": 1 - abs(float(norm / wanted) - 1), "two": 0.5}

    methods = ["ASWUDI", "DC-Merge"]
    path = tmp_path / "validation.json"
    chosen, rows = beside.tune(methods, tuned, base, judge, path)
    assert chosen == {"ASWUDI": {}, "DC-Merge": {"density": 1e-2, beside.SCALE: 1.3}}
    assert [row["settings"] for row in rows] == beside.points("DC-Merge")
    assert {row["method"] for row in rows} == {"dc-merge"}
    assert len(judged) == len(rows) == 8
    assert beside.tune(methods, tuned, base, judge, path) == (chosen, rows)
    assert len(judged) == 8
