"""`python -m cart_plugin`, for Pythons that read no start-up files."""

import shutil
from pathlib import Path

import pytest

from tests.autoload.environment import ADAPTER, Environment


@pytest.fixture
def target(environment: Environment, tmp_path: Path) -> Path:
    """What `pip install --target` makes: the plugin in a folder of its own."""
    folder = tmp_path / "target"
    folder.mkdir()
    for path in environment.site.glob("*cart_plugin*"):
        path.rename(folder / path.name)
    return folder


def test_target_folder_alone_does_not_register(environment: Environment, target: Path) -> None:
    program = "from mergekit.merge_methods import registered_methods; print(registered_methods())"

    assert environment.output_of(program, PYTHONPATH=str(target)) == "()"


def test_target_folder_serves_mergekit_commands(environment: Environment, target: Path) -> None:
    done = environment.run(
        "-m", "cart_plugin", "mergekit-yaml", "a", "--flag", PYTHONPATH=str(target)
    )

    assert done.stdout == "['mergekit-yaml', 'a', '--flag'] ('cart',)\n"
    assert (done.returncode, done.stderr) == (3, "")


def test_python_without_site_serves_mergekit_commands(environment: Environment) -> None:
    done = environment.run(
        "-S", "-m", "cart_plugin", "mergekit-yaml", PYTHONPATH=str(environment.site)
    )

    assert (done.stdout, done.stderr) == ("['mergekit-yaml'] ('cart',)\n", "")


@pytest.mark.parametrize("options", [[], ["-S"]])
def test_spawned_workers_know_cart(environment: Environment, options: list[str]) -> None:
    done = environment.run(
        *options, "-m", "cart_plugin", "mergekit-spawn", PYTHONPATH=str(environment.site)
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "[('cart',)]\n", "")


def test_workers_of_ordinary_programs_know_cart(environment: Environment) -> None:
    program = (
        "import multiprocessing, concurrent.futures, mergekit.scripts as s\n"
        "spawn = multiprocessing.get_context('spawn')\n"
        "with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:\n"
        "    print(pool.submit(s.work, 0).result())\n"
        "s.spawn()"
    )
    assert environment.output_of(program) == "('cart',)\n[('cart',)]"


def test_command_that_cannot_be_loaded_is_named(environment: Environment) -> None:
    done = environment.run("-m", "cart_plugin", "mergekit-broken")

    assert done.returncode == 1
    assert done.stderr.startswith("cart_plugin: mergekit-broken cannot be loaded: No module named")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def with_click(environment: Environment) -> Environment:
    """The stand-ins, and a command line of our own with one command."""
    cli = (
        "import click\n"
        "@click.group()\n"
        "def main(): pass\n"
        "@main.command()\n"
        "@click.argument('words', nargs=-1)\n"
        "def doctor(words): print('doctor', *words)\n"
    )
    shutil.rmtree(environment.site / "cart_plugin/cli", ignore_errors=True)
    environment.write({"cart_plugin/cli.py": cli, **ADAPTER})
    environment.add_installed_packages()
    return environment


def test_commands_of_ours_run(with_click: Environment) -> None:
    for command in (["doctor", "x"], ["mergekit-cart", "doctor", "x"]):
        done = with_click.run("-m", "cart_plugin", *command)
        assert (done.returncode, done.stdout, done.stderr) == (0, "doctor x\n", "")


@pytest.mark.parametrize("name", ["mergekit-yam", "not-a-command"])
def test_unknown_command_gets_one_line_with_the_list(with_click: Environment, name: str) -> None:
    done = with_click.run("-m", "cart_plugin", name, "a")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"cart_plugin: no command {name!r}; there are: "
        "mergekit-broken, mergekit-spawn, mergekit-yaml, mergekit-cart, doctor\n"
    )


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["-h"], 0)])
def test_help_lists_the_commands(with_click: Environment, arguments: list[str], code: int) -> None:
    done = with_click.run("-m", "cart_plugin", *arguments)

    assert done.returncode == code
    assert "mergekit-spawn, mergekit-yaml, mergekit-cart, doctor" in done.stdout


def test_without_mergekit_only_ours_are_listed(with_click: Environment, tmp_path: Path) -> None:
    program = (
        "import runpy, sys\n"
        "from importlib import metadata\n"
        "found = metadata.distribution\n"
        "def distribution(name):\n"
        "    if name == 'mergekit': raise metadata.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "metadata.distribution = distribution\n"
        "sys.argv = ['-m', 'mergekit-yaml']\n"
        "runpy.run_module('cart_plugin', run_name='__main__')"
    )
    done = with_click.run("-c", program)

    assert (done.returncode, done.stderr) == (
        2,
        "cart_plugin: no command 'mergekit-yaml'; there are: mergekit-cart, doctor\n",
    )
