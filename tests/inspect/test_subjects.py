"""Which models a recipe names: revisions, adapters, and folders with signs in their names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from cart_plugin.cli import main
from cart_plugin.execution.subjects import subjects
from cart_plugin.inspect import inspect_models
from cart_plugin.inspect.sources import Named, cached
from tests.inspect.conftest import report

Run = Callable[..., Result]


def save_recipe(file: Path, models: list[Any], **others: Any) -> Path:
    listed = [{"model": model} for model in models]
    file.write_text(yaml.safe_dump({"merge_method": "cart", "models": listed, **others}))
    return file


@pytest.fixture
def hub(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two revisions of `org/math`: the first two models."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--math"
    (repository / "refs").mkdir(parents=True)
    for folder, commit, name in zip(models, ("a" * 40, "b" * 40), ("main", "v2"), strict=False):
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return repository / "snapshots"


def test_a_recipes_revision_is_the_one_that_is_measured(
    run: Run, hub: Path, models: list[Path], base: Path, tmp_path: Path
) -> None:
    assert cached("org/math") == hub / ("a" * 40)
    assert cached("org/math@v2") == hub / ("b" * 40)
    assert cached("org/math@v3") == Path("org/math@v3")
    recipe = save_recipe(tmp_path / "r.yaml", ["org/math@v2", str(models[2])], base_model=str(base))
    assert run(recipe, "--out", tmp_path / "out").exit_code == 0
    expected = inspect_models([models[1], models[2]], base=base)
    found = report(tmp_path / "out")["movements"]
    moved = [movement.moved for movement in expected.movements()]
    assert [movement["moved"] for movement in found] == pytest.approx(moved)
    advised = yaml.safe_load(report(tmp_path / "out")["advice"]["recipe"])
    assert advised["models"][0]["model"] == "org/math@v2"
    assert subjects(save_recipe(recipe, [str(models[0])], base_model="org/math@v2"), None) == (
        subjects(save_recipe(recipe, [str(models[0])]), "org/math@v2")
    )


def test_what_is_no_folder_of_the_hub_has_no_revision(models: list[Path], tmp_path: Path) -> None:
    """As for mergekit, which asks for one only where the path does not exist."""
    recipe = save_recipe(tmp_path / "r.yaml", [f"{models[0]}@v2", str(models[1])])
    assert subjects(recipe, None).models == (str(models[0]), str(models[1]))


def test_a_base_with_an_adapter_is_refused(
    run: Run, models: list[Path], base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    recipe = save_recipe(
        tmp_path / "r.yaml", list(map(str, models)), base_model=f"{base}+{adapters[0]}"
    )
    found = run(recipe)
    assert found.exit_code == 1
    assert "has an adapter, and inspect takes a whole one; fuse them" in found.output
    assert len(found.output.strip().splitlines()) == 1
    assert run(recipe, "--base", base).exit_code == 0


@pytest.mark.parametrize("sign", ["+", "@"])
def test_folders_with_signs_are_advised_as_mergekit_reads_them(
    sign: str, run: Run, models: list[Path], base: Path, tmp_path: Path
) -> None:
    folders = [
        Path(shutil.copytree(folder, tmp_path / f"a{sign}{number}"))
        for number, folder in enumerate([*models, base])
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(inspect_models(folders[:3], base=folders[3]).advice().recipe)
    assert str(folders[3]) in recipe.read_text()
    result = CliRunner().invoke(main, ["doctor", str(recipe)])
    assert result.exit_code == 0, result.output
    found = subjects(recipe, None)
    assert found.models == tuple(map(str, folders[:3]))
    assert found.base == str(folders[3])


def test_a_base_with_a_sign_and_its_adapters(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    signed = Path(shutil.copytree(base, tmp_path / "a+base"))
    written = [f"{signed}+{folder}" for folder in adapters]
    assert Named.parse(written[0]) == Named(str(signed), str(adapters[0]))
    advised = yaml.safe_load(inspect_models(written).advice().recipe)
    found = advised["models"][0]["model"]
    assert found == {"model": {"path": str(signed)}, "lora": str(adapters[0])}


def test_adapters_with_signs_get_the_command(adapters: list[Path], tmp_path: Path) -> None:
    folders = [shutil.copytree(folder, tmp_path / f"a+{folder.name}") for folder in adapters]
    recipe = inspect_models(folders).advice().recipe
    assert recipe.startswith("mergekit-cart merge-adapters")
