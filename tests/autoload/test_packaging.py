"""What is built holds the start-up files, the Hydra plugin and the configs in their places."""

import importlib.util
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

from tests.autoload.environment import ROOT, Environment

START_UP = {"zzz_cart_plugin.pth", "zzz_cart_plugin.start"}


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("kind", ["wheel", "editable_wheel"])
def test_start_up_files_are_at_the_top_and_recorded(
    kind: str, request: pytest.FixtureRequest
) -> None:
    wheel: Path = request.getfixturevalue(kind)
    assert names_in(wheel) >= START_UP
    with zipfile.ZipFile(wheel) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith("/RECORD"))
        recorded = {line.split(",")[0] for line in archive.read(record).decode().splitlines()}
    assert recorded >= START_UP  # pip uninstall removes what is recorded


def test_wheel_holds_them_once_and_nothing_outside_the_package(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names_in(wheel)}
    (info,) = (top for top in tops if top.endswith(".dist-info"))

    assert tops == {"cart_plugin", "hydra_plugins", info, *START_UP}
    assert not [n for n in names_in(wheel) if n.startswith("cart_plugin") and "zzz" in n]


def test_hydra_finds_the_plugin_by_namespace_and_by_entry_point(wheel: Path) -> None:
    found = {name for name in names_in(wheel) if name.startswith("hydra_plugins/")}
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        entries = ConfigParser()
        entries.read_string(archive.read(name).decode())

    # An __init__.py would hide the plugins of other packages.
    assert found == {"hydra_plugins/cart_plugin_search_path.py"}
    place = "hydra_plugins.cart_plugin_search_path:CartSearchPath"
    assert dict(entries["hydra.plugins"]) == {"cart_plugin": place}


def test_wheel_holds_every_config_of_fusion_bench(wheel: Path) -> None:
    conf = "cart_plugin/fusion_bench/conf"
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / conf).rglob("*.yaml")}
    for path in (ROOT / "configs" / "fusion_bench").rglob("*.yaml"):
        expected.add(f"{conf}/{path.relative_to(ROOT / 'configs' / 'fusion_bench').as_posix()}")

    assert {name for name in names_in(wheel) if name.startswith(conf)} == expected
    assert f"{conf}/method/cart.yaml" in expected
    assert f"{conf}/experiment/cart/clip-vit-b32_8-tasks.yaml" in expected


def test_configs_of_an_installed_wheel_compose(real_environment: Environment) -> None:
    pytest.importorskip("fusion_bench")
    # A stand-in: Hydra's part needs none of FusionBench but its configs.
    real_environment.write({"fusion_bench/__init__.py": ""})
    program = (
        "import sys, fusion_bench\n"
        "from hydra import compose, initialize_config_dir\n"
        "with initialize_config_dir(sys.argv[1], version_base=None):\n"
        "    config = compose('fabric_model_fusion', overrides=[\n"
        "        '+experiment=cart/clip-vit-b32_8-tasks', 'taskpool=cart/lm_eval'])\n"
        "print(config.method.rank_ratio, config.taskpool._target_)\n"
        "import cart_plugin.fusion_bench.experiments as experiments\n"
        "print(experiments.__file__, experiments.checkout_folder())\n"
    )
    spec = importlib.util.find_spec("fusion_bench_config")
    assert spec is not None
    assert spec.submodule_search_locations
    done = real_environment.run("-c", program, next(iter(spec.submodule_search_locations)))
    first, second = done.stdout.splitlines()

    assert done.returncode == 0, done.stderr
    assert first == "0.12 cart_plugin.fusion_bench.taskpool.LMEvalHarnessTaskPool"
    assert second.startswith(str(real_environment.site))
    assert second.endswith(" None")


def test_without_hydra_nothing_of_fusion_bench_is_asked_for(environment: Environment) -> None:
    assert environment.output_of("import cart_plugin.fusion_bench; print('fine')") == "fine"


def test_editable_path_is_read_before_the_hook_needs_it(editable_wheel: Path) -> None:
    path_files = sorted(name for name in names_in(editable_wheel) if name.endswith(".pth"))

    assert path_files[-1] == "zzz_cart_plugin.pth"
    assert len(path_files) == 2


def test_wheel_built_from_the_sdist_is_the_wheel(tmp_path: Path, wheel: Path) -> None:
    (sdist,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (rebuilt,) = WheelBuilder(str(source)).build(
        directory=str(tmp_path / "out"), versions=["standard"]
    )

    assert names_in(Path(rebuilt)) == names_in(wheel)


def test_pth_file_is_one_line() -> None:
    lines = (ROOT / "cart_plugin/autoload/zzz_cart_plugin.pth").read_text().splitlines()

    assert len(lines) == 1  # Python executes line by line, and only lines that start so
    assert lines[0].startswith("import ")


@pytest.mark.slow
def test_pip_installs_and_removes_them(tmp_path: Path, wheel: Path) -> None:
    folder = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
    (site,) = folder.glob("lib/python*/site-packages")

    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True)
    assert {path.name for path in site.iterdir()} >= START_UP
    subprocess.run([*pip, "uninstall", "--yes", "cart-plugin"], check=True)
    assert not [path for path in site.iterdir() if "cart_plugin" in path.name]
