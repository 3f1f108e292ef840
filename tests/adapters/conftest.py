"""A tiny Llama and three adapters of it, to be read only."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.adapters.lora import save_base, save_loras


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("adapters-base"), num_hidden_layers=2)


@pytest.fixture(scope="session")
def trio(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """math, code and german."""
    return save_loras(tmp_path_factory.mktemp("adapters"), base)


@pytest.fixture
def own_trio(trio: list[Path], tmp_path: Path) -> list[Path]:
    """Copies of the three that a test may change."""
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in trio]
