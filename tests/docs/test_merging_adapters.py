"""The page on merging adapters: its commands, recipe and Python, on tiny adapters."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from cart_plugin.cli import main
from tests.adapters.lora import config_of
from tests.docs.pages import FILLED, blocks

PAGE = FILLED["docs/merging-adapters.md"]


def run(line: str) -> str:
    done = CliRunner().invoke(main, shlex.split(line)[1:])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.filterwarnings("ignore")  # PEFT's
def test_the_page_runs_as_it_stands(here: Path) -> None:
    first, by_recipe = blocks(PAGE, "sh")
    output = run(first)
    assert config_of(here / "merged")["r"] == 16
    (shown,) = blocks(PAGE, "text")
    said = shown.splitlines()[1].split()[:-1]
    assert output.split()[: len(said)] == said
    (recipe,) = blocks(PAGE, "yaml")
    (here / "adapters.yaml").write_text(recipe)
    run(by_recipe)
    assert config_of(here / "merged-by-recipe")["r"] == 32
    names: dict[str, object] = {}
    for code in blocks(PAGE, "python"):
        exec(code, names)  # noqa: S102  (our own page)
    report = names["report"]
    assert list(report.paths) == ["math", "code", "german"]  # type: ignore[attr-defined]
    assert names["model"].active_adapters == ["both"]  # type: ignore[attr-defined]
    assert config_of(here / "merged-again")["r"] == 16
