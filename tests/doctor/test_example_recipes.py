"""The recipes that people copy come with every kind of installation."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

from cart_plugin.doctor import recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.name for path in (ROOT / "configs" / "mergekit").glob("*.yaml"))


def test_a_clone_has_them_at_its_top() -> None:
    assert recipe.example_recipes() == ROOT / "configs" / "mergekit"
    assert RECIPES


def test_a_wheel_carries_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site-packages")
    installed = tmp_path / "site-packages" / "cart_plugin"
    monkeypatch.setattr(recipe, "__file__", str(installed / "cli" / "recipe.py"))
    assert recipe.example_recipes() == installed / "configs" / "mergekit"
    assert sorted(path.name for path in recipe.example_recipes().iterdir()) == RECIPES


def test_an_editable_wheel_leaves_them_in_the_clone(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["editable"])
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.startswith("cart_plugin/")]


def test_an_sdist_has_all_that_its_tests_need(tmp_path: Path) -> None:
    (sdist,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {f"configs/mergekit/{name}" for name in RECIPES}
    assert names >= {"LICENSE", "Makefile", "README.md", "CHANGELOG.md", "constraints.txt"}
    assert names >= {".ci/run", "pyproject.toml", "tests/doctor/test_example_recipes.py"}
    assert names >= {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").rglob("*.py")}
    assert names >= sources
