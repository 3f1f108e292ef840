"""Checks of the installation: what doctor says where something is missing, broken or too old."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib import metadata
from types import ModuleType, SimpleNamespace
from typing import Any

import mergekit.merge_methods
import pytest
import torch
from click.testing import CliRunner

import cart_plugin.mergekit
from cart_plugin.autoload import hook
from cart_plugin.cli import main
from cart_plugin.doctor import environment, machine
from cart_plugin.doctor.findings import Finding, Level
from tests.doctor.conftest import Report

cart_plugin.mergekit.register()


def run() -> Report:
    return Report(CliRunner().invoke(main, ["doctor"]))


def only(found: list[Finding]) -> Finding:
    assert len(found) == 1
    return found[0]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Installed versions to pretend; None for a package that is not there."""
    pretended: dict[str, str | None] = {}
    real = metadata.version

    def version(name: str) -> str:
        if name not in pretended:
            return real(name)
        found = pretended[name]
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(environment, "_requirement", lambda name: _BOUNDS[name])
    return pretended


_BOUNDS = {
    "torch": "torch>=2.2",
    "mergekit": "mergekit<0.2,>=0.1.5",
    "transformers": "transformers",
}


@pytest.fixture
def break_import(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Exception], None]:
    """Make the import of a module raise."""
    real = importlib.import_module

    def break_import(broken: str, error: Exception) -> None:
        def import_module(name: str, package: str | None = None) -> ModuleType:
            if name.split(".")[0] == broken:
                raise error
            return real(name, package)

        monkeypatch.setattr(importlib, "import_module", import_module)

    return break_import


@pytest.mark.parametrize("found", ["0.1.5", "0.1.5+local", "0.1.9"])
def test_supported_version_is_ok(versions: dict[str, str | None], found: str) -> None:
    versions["mergekit"] = found
    assert environment._check_package("mergekit").level is Level.OK


@pytest.mark.parametrize("found", ["0.1.4", "0.2.0"])
def test_unsupported_version_says_which_to_install(
    versions: dict[str, str | None], found: str
) -> None:
    versions["mergekit"] = found
    finding = environment._check_package("mergekit")
    assert finding == Finding(
        Level.PROBLEM, f"mergekit {found} is not supported", "pip install 'mergekit<0.2,>=0.1.5'"
    )


def test_missing_package_says_how_to_install_it(versions: dict[str, str | None]) -> None:
    versions["torch"] = None
    finding = environment._check_package("torch")
    assert (finding.level, finding.fact) == (Level.PROBLEM, "torch is not installed")
    assert finding.advice == "pip install 'torch>=2.2'"


def test_requirements_are_those_of_the_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    required = {
        "cart-plugin": ["torch>=2.2", "mergekit<0.2,>=0.1.5", 'mergekit>9; extra == "x"'],
        "mergekit": ["torch>=2.0", "transformers<6,>=5"],
    }
    monkeypatch.setattr(metadata, "requires", required.__getitem__)
    assert environment._requirement("torch") == "torch>=2.2,>=2.0"
    assert environment._requirement("mergekit") == "mergekit>=0.1.5,<0.2"
    assert environment._requirement("transformers") == "transformers>=5,<6"


def test_running_from_a_folder_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.distribution

    def distribution(name: str) -> Any:
        if name == "cart-plugin":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    finding = environment.check_versions()[0]
    assert finding.level is Level.WARNING
    assert "python -m cart_plugin" in finding.advice


def test_broken_torch_is_reported_without_traceback(
    break_import: Callable[[str, Exception], None],
) -> None:
    break_import("torch", OSError("libtorch_cpu.so: cannot open shared object file"))
    report = run()
    report.has_only_problem("torch cannot be imported: OSError: libtorch_cpu.so", "pip install")


def test_missing_mergekit_is_reported_without_traceback(
    break_import: Callable[[str, Exception], None],
) -> None:
    break_import("mergekit", ModuleNotFoundError("No module named 'mergekit'"))
    report = run()
    report.has_only_problem("mergekit cannot be imported: ModuleNotFoundError", "pip install")


@pytest.fixture
def registration(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finding]:
    """The finding on a registration that went as told."""

    def check(*, known: bool, **status: Any) -> Finding:
        told = {"route": None, "installed": False, "registered": known, "error": "", **status}
        monkeypatch.setattr(hook, "status", lambda: SimpleNamespace(**told))
        methods = SimpleNamespace(
            get=lambda name: cart_plugin.mergekit.CartMerge() if known else None
        )
        return only(environment.check_registration(methods))  # type: ignore[arg-type]

    return check


@pytest.mark.parametrize("route", ["pth", "start"])
def test_registered_at_start_up_is_ok(registration: Callable[..., Finding], route: str) -> None:
    assert registration(known=True, route=route, installed=True).level is Level.OK


def test_registered_in_this_process_only_is_a_warning(
    registration: Callable[..., Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.site, "getsitepackages", list)
    monkeypatch.setattr(environment.site, "getusersitepackages", lambda: "/nowhere")
    finding = registration(known=True, route="explicit", installed=True)
    assert finding.level is Level.WARNING
    assert "is not in this Python's site-packages" in finding.fact
    assert "python -m cart_plugin mergekit-yaml" in finding.advice


def test_failed_registration_gives_its_cause(registration: Callable[..., Finding]) -> None:
    error = "Traceback (most recent call last):\n  ...\nImportError: no MergeMethodSpec\n"
    finding = registration(known=False, route="pth", installed=True, error=error)
    assert finding.level is Level.PROBLEM
    assert finding.fact.endswith("failed with ImportError: no MergeMethodSpec")


def test_start_up_files_that_were_not_read_are_a_problem(
    registration: Callable[..., Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.sys, "flags", SimpleNamespace(no_site=1))
    finding = registration(known=False)
    assert finding.level is Level.PROBLEM
    assert "python -S does not read start-up files" in finding.fact
    assert "python -m cart_plugin" in finding.advice


def test_hook_without_effect_is_a_problem(registration: Callable[..., Finding]) -> None:
    finding = registration(known=False, route="pth", installed=True)
    assert finding.level is Level.PROBLEM
    assert "although the start-up hook ran" in finding.fact


def test_a_method_of_the_same_name_is_a_problem() -> None:
    methods = SimpleNamespace(get=lambda name: object())
    finding = only(environment.check_registration(methods))  # type: ignore[arg-type]
    assert finding.level is Level.PROBLEM
    assert "belongs to builtins" in finding.fact


def test_self_test_agrees_with_the_formula() -> None:
    finding = environment.check_merge(torch, mergekit.merge_methods)
    assert finding.level is Level.OK


def test_self_test_notices_wrong_numbers() -> None:
    methods = SimpleNamespace(
        get=lambda name: object(),
        merge_tensors=lambda tensors, *_, **__: sum(tensors) / len(tensors),
    )
    finding = environment.check_merge(torch, methods)  # type: ignore[arg-type]
    assert finding.level is Level.PROBLEM
    assert "do not trust" in finding.advice


def test_self_test_that_raises_is_a_problem() -> None:
    finding = environment.check_merge(torch, SimpleNamespace(get=lambda name: object()))  # type: ignore[arg-type]
    assert finding.level is Level.PROBLEM
    assert "AttributeError" in finding.fact


def test_gpus_are_listed_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(name="Some GPU", total_memory=24_000_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    facts = [finding.fact for finding in machine.check_devices(torch)]
    assert facts[1:] == [f"cuda:{n}: Some GPU, 24 GB (mergekit: --cuda)" for n in (0, 1)]


def test_apple_gpu_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 16_000_000_000)
    fact = machine.check_devices(torch)[1].fact
    assert "16 GB (mergekit: --device mps)" in fact
    assert "decomposed on the CPU" in fact


@pytest.mark.parametrize(
    ("threads", "cores", "level", "advice"),
    [
        (4, 4, Level.OK, ""),
        (1, 1, Level.OK, ""),
        (1, 4, Level.WARNING, "pass -j 4 to mergekit"),
        (8, 2, Level.WARNING, "pass -j 2 to mergekit"),
    ],
)
def test_threads_are_compared_with_the_cores(
    threads: int, cores: int, level: Level, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(machine, "cores", lambda: cores)
    finding = only(machine.check_threads(torch))
    assert finding.level is level
    assert advice in finding.advice


def test_optional_packages_are_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert machine.available_memory() is None
    assert machine.check_threads(torch)
    assert machine.check_devices(torch)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 KB"), (2.345e9, "2.35 GB"), (5e15, "5000 TB")],
)
def test_sizes_are_readable(number: float, text: str) -> None:
    assert machine.size(number) == text
