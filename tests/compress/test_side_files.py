"""What a model has beside config and weights: the folders of sentence-transformers' modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cart_plugin.compress import compress, expand
from tests.compress.models import TASKS, save_tasks

POOLING, DENSE = "1_Pooling/config.json", "2_Dense/model.safetensors"


def give_modules(model: Path, dense: float) -> None:
    paths = ("", "1_Pooling", "2_Dense")
    (model / "modules.json").write_text(json.dumps([{"path": path} for path in paths]))
    (model / "sentence_bert_config.json").write_text("{}")
    for name in paths[1:]:
        (model / name).mkdir()
        (model / name / "config.json").write_text(json.dumps({"name": name}))
    save_file({"linear.weight": torch.full((4, 32), dense)}, model / DENSE)


def files(folder: Path) -> dict[str, bytes]:
    """All but config and the model's own weights."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    own = ("model.", "model-", "config.json")
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if path.is_file() and not name.startswith(own)
    }


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return save_tasks(tmp_path, "bare-bert", num_hidden_layers=1)


def test_every_task_gets_its_own_modules_back(models: list[Path], tmp_path: Path) -> None:
    for number, model in enumerate(models):
        give_modules(model, float(number))
    (models[2] / POOLING).unlink()
    (models[2] / "vocab.v3").write_text("an odd vocabulary")
    report = compress(models, tmp_path / "out")
    assert files(tmp_path / "out" / "base") == files(models[0])
    kept = tmp_path / "out" / "adapters" / "two" / "task_files"
    assert files(kept) == {DENSE: (models[1] / DENSE).read_bytes()}
    assert report.task_files == [[], [DENSE], ["vocab.v3", DENSE]]
    assert report.absent_files == [[], [], [POOLING]]
    assert any(f"{DENSE} of two differ from the base's" in note for note in report.notes)
    for task, model in zip(TASKS, models, strict=True):
        expand(tmp_path / "out", task, tmp_path / "full" / task)
        assert files(tmp_path / "full" / task) == files(model)


def test_a_base_without_modules_gets_the_first_models(models: list[Path], tmp_path: Path) -> None:
    first, *others = models
    (first / "LICENSE").write_text("free")
    for model in others:
        give_modules(model, 1.0)
    compress(others, tmp_path / "out", base=first)
    expected = {**files(first), **files(others[0])}
    assert files(tmp_path / "out" / "base") == expected
    expand(tmp_path / "out", "three", tmp_path / "full")
    assert files(tmp_path / "full") == files(others[1])
