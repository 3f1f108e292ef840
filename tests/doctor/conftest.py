"""Tiny models shared by the tests of the command line, and a runner that returns plain lines."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cart_plugin.cli import main
from tests.doctor.tiny import save_models, write_recipe


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Three random models of an architecture, saved once and not to be changed."""
    made: dict[str, list[str]] = {}

    def saved(architecture: str, *, original_format: bool = True) -> list[str]:
        key = f"{architecture}-{original_format}"
        if key not in made:
            folder = tmp_path_factory.mktemp(key)
            made[key] = save_models(folder, architecture, original_format=original_format)
        return made[key]

    return saved


@pytest.fixture
def llamas(saved: Callable[..., list[str]]) -> list[str]:
    """Three Llama models, not to be changed."""
    return saved("llama")


@pytest.fixture
def own_llamas(llamas: list[str], tmp_path: Path) -> list[str]:
    """Three Llama models that a test may break."""
    copies = [tmp_path / f"llama-{number}" for number in range(3)]
    for source, copy in zip(llamas, copies, strict=True):
        shutil.copytree(source, copy)
    return [str(copy) for copy in copies]


class Report:
    """What doctor printed: its findings by level."""

    def __init__(self, result: Result) -> None:
        self.text = result.output
        self.exit_code = result.exit_code
        assert "Traceback" not in self.text
        assert not result.exception or isinstance(result.exception, SystemExit), result.exception

    def _facts(self, level: str) -> list[str]:
        lines = self.text.splitlines()
        return [
            " ".join([line.split(maxsplit=1)[1], *lines[number + 1 : number + 2]])
            for number, line in enumerate(lines)
            if line.startswith(f"  {level} ")
        ]

    @property
    def problems(self) -> list[str]:
        """Each problem with its advice."""
        return self._facts("problem")

    @property
    def warnings(self) -> list[str]:
        """Each warning with its advice."""
        return self._facts("warning")

    def _only(self, findings: list[str], *parts: str) -> None:
        assert len(findings) == 1, self.text
        for part in parts:
            assert part in findings[0], findings[0]
        assert "-> " in findings[0]

    def has_only_problem(self, *parts: str) -> None:
        """One problem, with these parts in fact or advice, and the exit code for it."""
        self._only(self.problems, *parts)
        assert self.exit_code == 1

    def has_only_warning(self, *parts: str) -> None:
        """No problem, and one warning with these parts in fact or advice."""
        assert self.problems == []
        self._only(self.warnings, *parts)
        assert self.exit_code == 0

    def is_clean(self) -> None:
        """Neither problem nor warning."""
        assert self.problems == []
        assert self.warnings == []
        assert self.exit_code == 0


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """Run `mergekit-cart doctor` on a recipe, without the checks of the installation."""
    monkeypatch.setattr("cart_plugin.doctor.environment.check_environment", lambda show: True)

    def run(*arguments: object) -> Report:
        return Report(CliRunner().invoke(main, ["doctor", *map(str, arguments)]))

    return run


@pytest.fixture
def check(doctor: Callable[..., Report], tmp_path: Path) -> Callable[..., Report]:
    """Doctor on a recipe for models in the given folders."""

    def check(folders: list[str], *options: object, **recipe: Any) -> Report:
        return doctor(write_recipe(tmp_path / "cart.yaml", folders, **recipe), *options)

    return check
