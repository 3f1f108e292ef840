"""The environments that the tests of this folder run in."""

from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from tests.autoload.environment import ADAPTER, MERGEKIT, ROOT, Environment, interpreters


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "interpreter" in metafunc.fixturenames:
        metafunc.parametrize("interpreter", interpreters(), ids=lambda path: Path(path).name)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return Path(path)


@pytest.fixture(scope="session")
def editable_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("editable")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["editable"])
    return Path(path)


@pytest.fixture
def environment(tmp_path: Path, wheel: Path, interpreter: str) -> Environment:
    """The plugin, with stand-ins for mergekit and for the adapter that would load torch."""
    made = Environment(tmp_path / "env", interpreter)
    made.install(wheel)
    made.write(MERGEKIT | ADAPTER)
    return made


@pytest.fixture
def real_environment(tmp_path: Path, wheel: Path) -> Environment:
    """The plugin beside the real mergekit and torch."""
    made = Environment(tmp_path / "env")
    made.add_installed_packages()
    made.install(wheel)
    return made
