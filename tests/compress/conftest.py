"""Models, and compressed ones, made once a kind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cart_plugin.compress import compress
from cart_plugin.compress.report import Report
from tests.compress.models import save_tasks


@dataclass
class Compressed:
    """Models, the folder made of them, and its report."""

    models: list[Path]
    out: Path
    report: Report

    @property
    def base(self) -> Path:
        return self.out / "base"

    def adapter(self, task: str) -> Path:
        return self.out / "adapters" / task


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Compressed]:
    """Compress models of a kind, with options of `compress`; the same ones only once."""
    done: dict[str, Compressed] = {}

    def make(kind: str, **options: object) -> Compressed:
        key = f"{kind} {sorted(options.items())}"
        if key not in done:
            folder = tmp_path_factory.mktemp(kind)
            models = save_tasks(folder, kind)
            options = options or {"rank_ratio": 0.25}
            report = compress(models, folder / "out", **options)  # type: ignore[arg-type]
            done[key] = Compressed(models, folder / "out", report)
        return done[key]

    return make


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three small language models."""
    return save_tasks(tmp_path_factory.mktemp("originals"), "llama", num_hidden_layers=1)


@pytest.fixture
def models(originals: list[Path], tmp_path: Path) -> list[Path]:
    """Copies that a test may break."""
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in originals]
