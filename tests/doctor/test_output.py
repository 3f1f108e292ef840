"""What doctor says about the folder that a merge is to be written to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.doctor.conftest import Report


@pytest.fixture
def models(own_llamas: list[str], tmp_path: Path) -> list[str]:
    """Three models, each in a folder of its own parent."""
    for number, model in enumerate(own_llamas):
        (tmp_path / f"of-{number}").mkdir()
        shutil.move(model, tmp_path / f"of-{number}" / "model")
    (tmp_path / "link").symlink_to(tmp_path / "of-1" / "model")
    return [str(tmp_path / f"of-{number}" / "model") for number in range(3)]


@pytest.mark.parametrize(
    "spelling", ["of-1/model", "of-1/model/", "of-1/../of-1/model", "./of-1/model", "link", "link/"]
)
def test_out_is_an_input(
    spelling: str,
    check: Callable[..., Report],
    models: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    report = check(models, "--out", spelling)
    report.has_only_problem(f"is model {models[1]}: it would be overwritten", "a folder of its own")


def test_an_input_is_out_by_another_name(
    check: Callable[..., Report], models: list[str], tmp_path: Path
) -> None:
    report = check([models[0], str(tmp_path / "link"), models[2]], "--out", models[1])
    report.has_only_problem(f"is model {tmp_path / 'link'}: it would be overwritten")


@pytest.mark.parametrize("spelling", ["of-1/model/merged", "link/a/b", "of-0/../of-1/model/x/"])
def test_out_inside_an_input(
    spelling: str, check: Callable[..., Report], models: list[str], tmp_path: Path
) -> None:
    report = check(models, "--out", f"{tmp_path}/{spelling}")
    report.has_only_problem(f"lies inside model {models[1]}", "outside of every input")
    assert not (Path(models[1]) / "merged").exists()


def test_an_input_inside_out(
    check: Callable[..., Report], models: list[str], tmp_path: Path
) -> None:
    report = check(models, "--out", tmp_path / "of-1")
    report.has_only_problem(f"model {models[1]} lies inside OUT {tmp_path / 'of-1'}")
    # mergekit-pytorch's inputs are files
    report = check([f"{model}/model.safetensors" for model in models], "--out", models[1])
    report.has_only_problem(f"model {models[1]}/model.safetensors lies inside OUT {models[1]}")


def test_a_base_and_an_adapter_are_inputs_too(
    check: Callable[..., Report], models: list[str], tmp_path: Path
) -> None:
    report = check(models[:2], "--out", models[2], base_model=models[2])
    assert any(f"is model {models[2]}: it would" in problem for problem in report.problems)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    report = check([*models[:2], f"{models[2]}+{adapter}"], "--out", adapter)
    assert any(f"is adapter {adapter}: it would" in problem for problem in report.problems)


def test_out_beside_the_inputs_is_fine(
    check: Callable[..., Report], models: list[str], tmp_path: Path
) -> None:
    check(models, "--out", tmp_path / "of-1" / "model-merged").is_clean()
    check(models, "--out", tmp_path / "new" / "merged").is_clean()
    (tmp_path / "merged").mkdir()
    check(models, "--out", tmp_path / "merged").is_clean()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    check(models, "--out", tmp_path / "merged").has_only_warning("is not empty", "choose another")


def test_out_is_a_file(check: Callable[..., Report], models: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    report = check(models, "--out", tmp_path / "file")
    report.has_only_problem(f"OUT {tmp_path / 'file'} is a file", "name a folder")
    report = check(models, "--out", tmp_path / "file" / "merged")
    report.has_only_problem(f"{tmp_path / 'file'} on the way to OUT is a file", "name a folder")


def test_out_that_may_not_be_written(
    check: Callable[..., Report],
    models: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "foreign").mkdir()
    real = os.access

    def access(path: str | Path, mode: int) -> bool:  # root may write anywhere
        return real(path, mode) and not (mode & os.W_OK and Path(path).name == "foreign")

    monkeypatch.setattr(os, "access", access)
    for out in (tmp_path / "foreign", tmp_path / "foreign" / "new" / "merged"):
        report = check(models, "--out", out)
        report.has_only_problem(f"{tmp_path / 'foreign'} is not yours to write to", "chmod")
