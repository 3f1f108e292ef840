"""What the pages tell people to type exists."""

import re
import shlex
from importlib.util import find_spec

import click
import pytest

from cart_plugin.cli import main
from tests.docs.pages import FILLED, ROOT, commands

COMMANDS = commands()
MAKEFILE = (ROOT / "Makefile").read_text()


def started_with(program: str) -> list[str]:
    found = [command for _, command in COMMANDS if command.split()[0] == program]
    assert found
    return sorted(set(found))


def check_options(command: click.Command, words: list[str]) -> None:
    known = {option for parameter in command.params for option in parameter.opts}
    used = {word.partition("=")[0] for word in words if re.match(r"-[a-z-]", word)}
    assert used <= known, command.name


def test_named_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    named = {command.split()[1] for command in started_with("make") if " " in command}
    for text in FILLED.values():
        named |= set(re.findall(r"`make ([a-z-]+)`", text))
    assert "demo" in named
    assert named <= targets


@pytest.mark.parametrize("line", started_with("mergekit-cart"))
def test_commands_and_options_of_mergekit_cart_exist(line: str) -> None:
    _, name, *words = shlex.split(line)
    command = main.get_command(click.Context(main), name)
    assert command is not None
    check_options(command, words)


@pytest.mark.parametrize("line", started_with("mergekit-yaml"))
def test_options_of_mergekit_yaml_exist(line: str) -> None:
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    check_options(mergekit_yaml, shlex.split(line)[1:])


@pytest.mark.parametrize("page", FILLED)
def test_options_named_in_the_text_exist(page: str) -> None:
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    context = click.Context(main)
    ours = [main.get_command(context, name) for name in main.list_commands(context)]
    known = {
        option
        for command in (*ours, mergekit_yaml)
        if command is not None
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    # Of pip, of servers, of a benchmark, of Ray.
    others = {"--target", "--max-lora-rank", "--quick", "--working-dir"}
    named = set(re.findall(r"`(--[a-z-]+)", FILLED[page]))
    if page.startswith("benchmarks"):
        pytest.skip("benchmarks have options of their own")
    assert named <= known | others


@pytest.mark.parametrize("line", started_with("python"))
def test_modules_that_are_run_exist(line: str) -> None:
    words = shlex.split(line)
    assert words[1] == "-m"
    assert find_spec(words[2]) is not None


def test_extras_that_are_installed_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    section = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    named = {
        extra
        for line in started_with("pip")
        for extras in re.findall(r"\[([\w,-]+)\]", line)
        for extra in extras.split(",")
    }
    assert named >= {"compare", "fusion-bench"}
    assert named <= set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE))


def test_programs_are_those_that_come_along() -> None:
    programs = {command.split()[0] for _, command in COMMANDS}
    ours = {"mergekit-cart", "mergekit-yaml", "fusion_bench", "make", "pip", "python", "ray"}
    assert programs <= ours


def test_what_the_doctor_reads_is_said() -> None:
    doctor = main.get_command(click.Context(main), "doctor")
    assert doctor is not None
    for page in (doctor.help or "", FILLED["README.md"], FILLED["docs/troubleshooting.md"]):
        (said,) = re.findall(r"headers of (?:the )?weight files.{0,160}", " ".join(page.split()))
        assert "values" in said
        assert "`out_dtype: float16`" in said
