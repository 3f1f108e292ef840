"""The command as people start it: help, laziness, exit codes, and what the terminal shows."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from cart_plugin.cli import console, main
from cart_plugin.doctor import findings
from tests.doctor.conftest import Report
from tests.doctor.tiny import write_recipe


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def test_help_imports_neither_torch_nor_mergekit() -> None:
    process = run_python(
        "import sys\n"
        "from cart_plugin.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'mergekit', 'transformers') if name in sys.modules])\n"
    )
    assert process.stdout.splitlines()[-1] == "[]"
    listed = dict(re.findall(r"^  ([a-z-]+) +(.+)$", process.stdout, re.MULTILINE))
    assert listed["compare"].startswith("Merge a recipe by several methods")
    assert listed["doctor"].startswith("Check the installation")
    assert listed["merge-adapters"].startswith("Merge LoRA adapters of one base")


def test_unknown_subcommand_is_an_error() -> None:
    result = CliRunner().invoke(main, ["doktor"])
    assert result.exit_code == 2
    assert "doktor" in result.output


def test_doctor_as_a_process_checks_installation_and_recipe(
    llamas: list[str], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "cart.yaml", llamas, parameters={"rank_rati": 0.1})
    code = "from cart_plugin.cli import main; main()"
    process = run_python(code, "doctor", str(recipe))
    assert process.returncode == 1, process.stderr
    assert process.stderr == ""
    assert "self-test: relative error" in process.stdout
    assert "did you mean rank_ratio?" in process.stdout
    assert process.stdout.splitlines()[-1].startswith("1 problem, ")


def test_recipe_is_not_checked_where_mergekit_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("cart_plugin.doctor.environment.check_environment", lambda show: False)
    result = CliRunner().invoke(main, ["doctor", str(tmp_path / "cart.yaml")])
    assert "The recipe was not checked" in result.output


def test_an_error_of_the_check_itself_is_a_problem_without_traceback(
    doctor: Callable[..., Report], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("cart_plugin.doctor.recipe.check_recipe", fail)
    doctor(tmp_path / "cart.yaml").has_only_problem("KeyError: 'surprise'", "report this")


def test_lines_are_wrapped_under_themselves_and_never_cut(capsys: pytest.CaptureFixture) -> None:
    path = "/a/very/long/path/" + "x" * 60
    finding = findings.problem(f"the model at {path} cannot be read by anybody", "copy it again")
    console.print_section(Console(width=60), findings.Section("Inputs", [finding]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["Inputs", "  problem  the model at"]
    assert lines[2] == " " * 11 + path
    assert lines[-1] == "           -> copy it again"


def test_output_that_is_piped_is_not_wrapped(capsys: pytest.CaptureFixture) -> None:
    finding = findings.warning("word " * 60 + "end", "do this")
    console.print_section(console.console(), findings.Section("Inputs", [finding]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].endswith("end")


def test_without_a_terminal_progress_is_a_line_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress() as tell:
        for done in range(4):
            now = 45.0 * done
            tell("measuring", done, 4000)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "measuring: 2 of 4,000\n"
