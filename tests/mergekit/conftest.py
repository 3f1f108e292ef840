"""Tiny Llama models, and merges of models in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cart_plugin.mergekit import register
from tests.doctor.tiny import load_tensors, save_models, write_recipe
from tests.mergekit.helpers import Tensors, run

register()


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Five Llama models, not to be changed."""
    return save_models(tmp_path_factory.mktemp("llamas"), "llama", 5)


@pytest.fixture(scope="session")
def inputs(llamas: list[str]) -> list[Tensors]:
    """What they hold."""
    return [load_tensors(folder) for folder in llamas]


@pytest.fixture
def own(llamas: list[str], tmp_path: Path) -> list[str]:
    """Three of them that a test may break."""
    return [shutil.copytree(llamas[i], tmp_path / f"own-{i}").as_posix() for i in range(3)]


@pytest.fixture
def merge(tmp_path: Path) -> Callable[..., Tensors]:
    """Merge models with a recipe given by its keys."""
    runs = 0

    def merge(
        models: list[Any] | None, options: dict[str, Any] | None = None, **recipe: Any
    ) -> Tensors:
        nonlocal runs
        runs += 1
        listed = [{"model": model} if isinstance(model, str) else model for model in models or ()]
        file = write_recipe(
            tmp_path / f"recipe-{runs}.yaml", [], **{"models": listed or None, **recipe}
        )
        return run(file, tmp_path / f"merged-{runs}", **(options or {}))

    return merge
