"""Python's own start: nothing printed, nothing loaded, whatever state the plugin is in."""

import shutil
from pathlib import Path

import pytest

from tests.autoload.environment import Environment

LOADED = "import sys; print(*sorted(sys.modules))"
STATUS = "from cart_plugin.autoload import hook; print(hook.status())"


def test_python_starts_with_three_more_modules_and_no_others(environment: Environment) -> None:
    loaded = set(environment.output_of(LOADED).split())
    (environment.site / "zzz_cart_plugin.pth").write_text("# Python loads a codec to read any .pth")
    (environment.site / "zzz_cart_plugin.start").unlink()
    without = set(environment.output_of(LOADED).split())

    assert loaded - without == {"cart_plugin", "cart_plugin.autoload", "cart_plugin.autoload.hook"}


def test_pth_file_installs_the_hook(environment: Environment) -> None:
    if "pth" not in (shown := environment.output_of(STATUS)):
        assert "route='start'" in shown  # Python 3.15 and newer prefer the .start file
    assert "installed=True, registered=False, error=''" in shown


def test_isolated_python_installs_the_hook(environment: Environment) -> None:
    assert "installed=True" in environment.output_of(STATUS, "-I")


def test_start_file_names_a_function_that_installs_the_hook(environment: Environment) -> None:
    (environment.site / "zzz_cart_plugin.pth").unlink()
    file = str(environment.site / "zzz_cart_plugin.start")
    program = f"import pkgutil; pkgutil.resolve_name(open({file!r}).read().strip())(); "

    assert "route='start', installed=True" in environment.output_of(program + STATUS)


def test_no_start_up_file_leaves_the_hook_out(environment: Environment) -> None:
    (environment.site / "zzz_cart_plugin.pth").unlink()
    (environment.site / "zzz_cart_plugin.start").unlink()

    assert "route=None, installed=False" in environment.output_of(STATUS)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("cart_plugin/autoload/hook.py", "def broken(:"),
        ("cart_plugin/autoload/hook.py", "raise RuntimeError('no')"),
        ("cart_plugin/autoload/hook.py", "import not_there"),
        ("cart_plugin/autoload/hook.py", "def install(route):\n    raise OSError('no')"),
        ("cart_plugin/autoload/hook.py", ""),
        ("cart_plugin/autoload/hook.py", "\x00"),
        ("cart_plugin/__init__.py", "def broken(:"),
        ("cart_plugin/__init__.py", "1 / 0"),
    ],
)
def test_broken_plugin_leaves_python_silent(environment: Environment, file: str, text: str) -> None:
    (environment.site / file).write_text(text)

    assert environment.output_of("print('started')") == "started"


@pytest.mark.parametrize(
    "missing", ["cart_plugin", "cart_plugin/autoload", "cart_plugin/autoload/hook.py"]
)
def test_missing_plugin_leaves_python_silent(environment: Environment, missing: str) -> None:
    path = environment.site / missing
    path.unlink() if path.is_file() else shutil.rmtree(path)

    assert environment.output_of("print('started')") == "started"


def test_missing_mergekit_leaves_python_and_its_error_alone(environment: Environment) -> None:
    shutil.rmtree(environment.site / "mergekit")

    program = "try: import mergekit.merge_methods\nexcept ImportError as e: print(repr(e), e.name)"
    assert environment.output_of(program) == (
        """ModuleNotFoundError("No module named 'mergekit'") mergekit"""
    )


def test_torch_is_not_loaded_at_start(real_environment: Environment) -> None:
    heavy = "import sys; print({'torch', 'mergekit', 'scipy', 'numpy'} & set(sys.modules))"

    assert real_environment.output_of(heavy) == "set()"


def test_plugin_folder_of_the_working_directory_is_not_needed(
    environment: Environment, tmp_path: Path
) -> None:
    done = environment.run("-c", STATUS, cwd=tmp_path)

    assert "installed=True" in done.stdout
