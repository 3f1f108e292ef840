"""Tiny models, and the command on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cart_plugin.cli import main
from tests.compare.helpers import EVALUATORS
from tests.doctor.tiny import save_models


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_models(tmp_path_factory.mktemp("llamas"), "llama", count=4)


@pytest.fixture
def compare(tmp_path: Path) -> Callable[..., Any]:
    def run(recipe: Path, *arguments: str, evaluator: str = "mean_sizes") -> Any:
        command = ["compare", str(recipe), "--out", str(tmp_path / "out")]
        if evaluator:
            command += ["--evaluator", f"{EVALUATORS}:{evaluator}"]
        return CliRunner().invoke(main, [*command, *arguments])

    return run
