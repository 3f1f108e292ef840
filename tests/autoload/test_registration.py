"""`cart` is there whenever mergekit's methods are, and a failure of ours stays ours."""

import zipfile

import pytest

from tests.autoload.environment import Environment

METHODS = "; from mergekit.merge_methods import registered_methods; print(registered_methods())"
STATUS = (
    "; from cart_plugin.autoload.hook import status; s = status(); print(s.registered, s.error)"
)


@pytest.mark.parametrize(
    "imports",
    [
        "import mergekit.merge_methods",
        "from mergekit import merge_methods",
        "from mergekit.merge_methods.registry import register",
        "import importlib; importlib.import_module('mergekit.merge_methods.registry')",
        "import mergekit.merge_methods, importlib; importlib.reload(mergekit.merge_methods)",
        "import cart_plugin.mergekit",
        "import mergekit.merge_methods; import cart_plugin.mergekit",
    ],
)
def test_importing_registers_once(environment: Environment, imports: str) -> None:
    assert environment.output_of(imports + STATUS) == "True"
    assert environment.output_of(imports + METHODS) == "('cart',)"


def test_explicit_install_serves_modules_that_are_already_there(environment: Environment) -> None:
    program = (
        f"import sys; sys.path.append({str(environment.site)!r})\n"
        "import mergekit.merge_methods as m, mergekit.evo.genome as g\n"
        "assert m.registered_methods() == ()\n"
        "from cart_plugin.autoload import hook; hook.install()\n"
        "print(m.registered_methods(), g.METHOD_PARAM_MAPS['cart'], hook.status())"
    )
    assert environment.output_of(program, "-S") == (
        "('cart',) ['weight'] Status(route='explicit', installed=True, registered=True, error='')"
    )


def test_installing_again_changes_nothing(environment: Environment) -> None:
    program = (
        "import sys; from cart_plugin.autoload import hook\n"
        "before = list(sys.meta_path); hook.install(); hook.install('start')\n"
        "print(sys.meta_path == before, hook.status().route != 'explicit')"
    )
    assert environment.output_of(program) == "True True"


def test_evolve_may_search_weights(environment: Environment) -> None:
    program = "from mergekit.evo.genome import METHOD_PARAM_MAPS as maps; print(maps)"

    assert (
        environment.output_of(program)
        == "{'linear': ['weight'], 'cart': ['weight'], 'cart_auto': ['weight']}"
    )


def test_evolve_keeps_an_entry_of_its_own(environment: Environment) -> None:
    environment.write(
        {"mergekit/evo/genome.py": "METHOD_PARAM_MAPS = {'cart': ['weight', 'rank']}"}
    )
    program = "from mergekit.evo.genome import METHOD_PARAM_MAPS as maps; print(maps)"

    assert environment.output_of(program) == "{'cart': ['weight', 'rank'], 'cart_auto': ['weight']}"


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("import torch_is_missing", "No module named 'torch_is_missing'"),
        ("def broken(:", "SyntaxError"),
        ("", "AttributeError"),
        ("def register(): raise ZeroDivisionError('ours')", "ZeroDivisionError: ours"),
        (
            "from mergekit import merge_methods\n"
            "def register():\n    merge_methods.register('cart'); merge_methods.register('cart')",
            "ValueError: cart is already registered",
        ),
    ],
)
def test_failing_registration_is_kept_for_doctor(
    environment: Environment, adapter: str, message: str
) -> None:
    environment.write({"cart_plugin/mergekit.py": adapter})

    shown = environment.output_of("import mergekit.merge_methods" + STATUS)
    assert shown.startswith("False Traceback")
    assert message in shown


def test_name_taken_by_another_plugin_is_kept_for_doctor(environment: Environment) -> None:
    with (environment.site / "mergekit/merge_methods/registry.py").open("a") as file:
        file.write("register('cart')\n")

    shown = environment.output_of("import mergekit.merge_methods" + STATUS)
    assert "ValueError: cart is already registered" in shown


def test_evolve_without_its_table_is_kept_for_doctor(environment: Environment) -> None:
    environment.write({"mergekit/evo/genome.py": ""})

    assert "METHOD_PARAM_MAPS" in environment.output_of("import mergekit.evo.genome" + STATUS)


def test_failure_that_was_repaired_is_forgotten(environment: Environment) -> None:
    environment.write({"cart_plugin/mergekit.py": "import not_yet\ndef register(): pass"})
    program = (
        "import sys, types, mergekit.merge_methods; from cart_plugin.autoload import hook\n"
        "assert 'not_yet' in hook.status().error\n"
        "sys.modules['not_yet'] = types.ModuleType('not_yet'); hook.install(); print(hook.status())"
    )
    assert "registered=True, error=''" in environment.output_of(program)


def test_errors_of_mergekit_pass_untouched(environment: Environment) -> None:
    environment.write({"mergekit/merge_methods/__init__.py": "raise KeyError('of mergekit')"})
    program = (
        "import sys\n"
        "try: import mergekit.merge_methods\n"
        "except KeyError as e: print(repr(e), e.__cause__, e.__context__)\n"
        "print('mergekit.merge_methods' in sys.modules)"
    ) + STATUS

    assert environment.output_of(program) == "KeyError('of mergekit') None None\nFalse\nFalse"


def test_threads_that_import_at_once_register_once(environment: Environment) -> None:
    slow = "import time; time.sleep(0.01)\n"
    for name in ("mergekit/merge_methods/__init__.py", "cart_plugin/mergekit.py"):
        path = environment.site / name
        path.write_text(slow + path.read_text())
    program = (
        "import threading, importlib, sys\n"
        "names = ['mergekit.merge_methods', 'cart_plugin.mergekit', 'mergekit.evo.genome'] * 4\n"
        "gate = threading.Barrier(len(names)); failures = []\n"
        "def load(name):\n"
        "    gate.wait()\n"
        "    try: importlib.import_module(name)\n"
        "    except BaseException as error: failures.append(error)\n"
        "threads = [threading.Thread(target=load, args=(name,)) for name in names]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]; print(failures)"
    )
    for _ in range(3):
        assert environment.output_of(program + STATUS) == "[]\nTrue"
        assert environment.output_of(program + METHODS) == "[]\n('cart',)"


def test_mergekit_in_a_zip_file_registers(environment: Environment) -> None:
    package = environment.site / "mergekit"
    with zipfile.ZipFile(environment.site / "packed.zip", "w") as archive:
        for path in package.rglob("*.py"):
            archive.write(path, path.relative_to(environment.site))
    package.rename(environment.site / "unpacked")
    add = f"import sys; sys.path.append({str(environment.site / 'packed.zip')!r}); "

    program = (
        add + "import mergekit.evo.genome as g; print('cart' in g.METHOD_PARAM_MAPS)" + METHODS
    )
    assert environment.output_of(program) == "True\n('cart',)"
