"""The program `fusion_bench` as people start it: in an empty folder, on models on disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("fusion_bench")

from tests.fusion_bench import pools

PROGRAM = Path(sys.executable).parent / "fusion_bench"
TINY = ("modelpool=tiny", "taskpool=tiny", "print_config=false", "fabric.accelerator=cpu")


class Done:
    """What a run printed and reported."""

    def __init__(self, ran: subprocess.CompletedProcess[str], folder: Path) -> None:
        self.code = ran.returncode
        # Rich breaks lines where it likes.
        self.output = " ".join((ran.stdout + ran.stderr).replace("│", " ").split())
        self._folder = folder

    @property
    def report(self) -> dict[str, Any]:
        (file,) = self._folder.rglob("program_report.json")
        loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return loaded


def run(folder: Path, configs: Path, *arguments: str) -> Done:
    """Run the program in a new folder."""
    folder.mkdir()
    ran = subprocess.run(
        [PROGRAM, "--config-dir", configs, *TINY, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "300"},
    )
    return Done(ran, folder)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pools.dinov2_pools(tmp_path_factory.mktemp("dinov2"))


def test_encoders_are_merged_and_evaluated_with_their_heads(dinov2: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "work", dinov2, "method=cart", "method.rank_ratio=0.25")

    assert done.code == 0, done.output
    assert set(done.report) == {"model_info", "average", *pools.TASKS}
    for task in pools.TASKS:
        assert 0 <= done.report[task]["accuracy"] <= 1


@pytest.mark.slow
def test_indexing_evaluates_each_task_on_its_own_model(dinov2: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "work", dinov2, "method=cart/indexing", "method.switch=true")

    assert done.code == 0, done.output
    assert set(done.report) == {"indexed", "storage"}
    assert 0 <= done.report["indexed"]["average"]["accuracy"] <= 1


@pytest.mark.slow
def test_clip_models_are_merged_and_evaluated(tmp_path: Path) -> None:
    configs = pools.clip_pools(tmp_path)
    done = run(tmp_path / "work", configs, "method=cart", "method.decompose=clip")

    assert done.code == 0, done.output
    assert {"mnist", "svhn", "average"} <= set(done.report)
    assert 0 <= done.report["average"]["accuracy"] <= 1


@pytest.mark.slow
def test_language_models_are_merged_and_evaluated_by_lm_eval(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    configs = pools.language_pools(tmp_path)
    done = run(tmp_path / "work", configs, "method=cart")

    assert done.code == 0, done.output
    assert 0 <= done.report["results"]["tiny_choice"]["acc,none"] <= 1
    assert done.report["n-samples"]["tiny_choice"]["effective"] == 4
    (results,) = (tmp_path / "work").rglob("lm_eval_results/**/results_*.json")
    assert json.loads(results.read_text(encoding="utf-8"))["results"] == done.report["results"]


@pytest.mark.slow
def test_a_missing_data_set_is_named(dinov2: Path, tmp_path: Path) -> None:
    gone = f"taskpool.test_datasets.shapes.dataset_path={tmp_path}/gone"
    done = run(tmp_path / "work", dinov2, "method=cart", gone)

    assert done.code != 0
    assert "test dataset 'shapes' cannot be loaded" in done.output
    assert f"{tmp_path}/gone" in done.output


@pytest.mark.slow
def test_a_missing_head_is_named_before_anything_is_merged(dinov2: Path, tmp_path: Path) -> None:
    gone = f"taskpool.heads.shapes={tmp_path}/gone"
    done = run(tmp_path / "work", dinov2, "method=cart", gone)

    assert done.code != 0
    assert "the head of task 'shapes': no .safetensors file in" in done.output
    assert "merge weights" not in done.output


@pytest.mark.slow
def test_a_pattern_that_matches_nothing_is_named(dinov2: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "work", dinov2, "method=cart", "method.decompose=[*.mpl.*]")

    assert done.code != 0
    assert "'*.mpl.*' is no preset" in done.output
    assert "matches none of the" in done.output


@pytest.mark.slow
def test_a_checkpoint_with_nan_is_named_with_its_tensor(dinov2: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(dinov2.parent / "encoders" / "shapes", broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if name.endswith("mlp.fc1.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    done = run(tmp_path / "work", dinov2, "method=cart", f"modelpool.models.shapes={broken}")

    assert done.code != 0
    assert f"tensor '{name}'" in done.output
    assert "shapes" in done.output
