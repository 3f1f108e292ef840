"""Merges in this process, where a process of their own shows nothing more."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cart_plugin.cli import main
from cart_plugin.execution import child
from cart_plugin.mergekit import register
from tests.doctor.tiny import save_models

register()


def run_here(function: str, arguments: Sequence[str], log: Path, tell: object = None) -> str:
    """As `child.run`, in this process."""
    module, _, name = function.partition(":")
    before = sys.argv
    sys.argv = [function, *arguments]
    try:
        with log.open("w") as output, redirect_stdout(output), redirect_stderr(output):
            getattr(importlib.import_module(module), name)()
    except SystemExit as end:
        return str(end.code)
    finally:
        sys.argv = before
        logging.disable(logging.NOTSET)
    return ""


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports alone take ten seconds in another one."""
    monkeypatch.setattr(child, "run", run_here)


@pytest.fixture
def merge(in_this_process: None) -> Callable[..., Result]:
    """Run `mergekit-cart merge`."""

    def run(*arguments: object) -> Result:
        done = CliRunner().invoke(main, ["merge", *map(str, arguments)])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done

    return run


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Three random models of an architecture, saved once and not to be changed."""
    made: dict[Any, list[str]] = {}

    def saved(architecture: str, **options: Any) -> list[str]:
        key = (architecture, *sorted(options.items()))
        if key not in made:
            made[key] = save_models(tmp_path_factory.mktemp("models"), architecture, **options)
        return made[key]

    return saved
