"""The hooked modules behave as if nobody had hooked them."""

import pytest

from tests.autoload.environment import Environment


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "expression",
    [
        "type(spec().loader).__name__ if loaded else 'SourceFileLoader'",
        "spec().loader.is_package(name)",
        "spec().loader.get_source(name)",
        "spec().loader.get_filename(name)",
        "spec().origin, spec().has_location, spec().submodule_search_locations, spec().parent",
        "importlib.resources.files(name).joinpath('data.txt').read_text()",
        "pkgutil.get_data(name, 'data.txt')",
        "[m.name for m in pkgutil.walk_packages(spec().submodule_search_locations)]",
    ],
)
def test_introspection_gives_the_same(environment: Environment, expression: str, when: str) -> None:
    program = (
        "import importlib.resources, importlib.util, pkgutil, sys\n"
        "name = 'mergekit.merge_methods'\n"
        f"loaded = {when == 'after'}\n"
        "if loaded: importlib.import_module(name)\n"
        "def spec(): return importlib.util.find_spec(name)\n"
        f"print({expression})"
    )
    hooked = environment.output_of(program)
    (environment.site / "zzz_cart_plugin.pth").unlink()
    (environment.site / "zzz_cart_plugin.start").unlink()

    assert environment.output_of(program) == hooked


def test_executing_module_sees_its_own_loader(environment: Environment) -> None:
    show = "print(type(__loader__).__name__, type(__spec__.loader).__name__)"
    environment.write({"mergekit/evo/genome.py": show})

    shown = environment.output_of("import mergekit.evo.genome")
    assert shown == "SourceFileLoader SourceFileLoader"


def test_lazy_loader_registers_when_the_module_is_used(environment: Environment) -> None:
    program = (
        "import importlib.util, sys\n"
        "spec = importlib.util.find_spec('mergekit.evo.genome')\n"
        "spec.loader = importlib.util.LazyLoader(spec.loader)\n"
        "module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module); print(sorted(module.METHOD_PARAM_MAPS))"
    )
    assert environment.output_of(program) == "['cart', 'cart_auto', 'linear']"


@pytest.mark.parametrize("place", ["0", "len(sys.meta_path)", "1"])
def test_finder_that_searches_again_does_not_loop(environment: Environment, place: str) -> None:
    program = (
        "import importlib.util, sys\n"
        "class Searching:\n"
        "    busy = False\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if self.busy: return None\n"
        "        self.busy = True\n"
        "        try: return importlib.util.find_spec(name)\n"
        "        finally: self.busy = False\n"
        f"sys.meta_path.insert({place}, Searching())\n"
        "from mergekit.merge_methods import registered_methods; print(registered_methods())"
    )
    assert environment.output_of(program) == "('cart',)"


def test_finder_of_the_old_protocol_is_passed_over(environment: Environment) -> None:
    program = (
        "import sys\n"
        "class Old:\n"
        "    def find_module(self, name, path=None): return None\n"
        "sys.meta_path.insert(1, Old())\n"
        "from mergekit.merge_methods import registered_methods; print(registered_methods())"
    )
    assert environment.output_of(program) == "('cart',)"
