"""Checks of the installation: versions, registration, hardware, and a merge of tiny matrices.

Nothing here may assume that torch or mergekit can be imported; whatever their import raises
becomes a finding.
"""

from __future__ import annotations

import importlib
import platform
import site
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from cart_plugin.autoload import hook
from cart_plugin.doctor.findings import Finding, Section, ok, problem, warning
from cart_plugin.doctor.machine import check_devices, check_threads
from cart_plugin.errors import first_line

_PACKAGES = ("torch", "mergekit", "transformers")
_REINSTALL = "pip install --force-reinstall --no-deps cart-plugin"
_TOLERANCE = 1e-5  # relative; fp32 rounding of a matrix this small stays ten times below it


def check_environment(show: Callable[[Section], None]) -> bool:
    """Check the installation, showing each section as it is ready.

    Returns:
        Whether torch and mergekit can be imported, which the checks of a recipe need.
    """
    show(Section("Versions", check_versions()))
    torch, torch_error = _imported("torch")
    if torch is None:
        advice = "pip install --force-reinstall torch"
        finding = problem(f"torch cannot be imported: {torch_error}", advice)
        show(Section("Hardware", [finding]))
        return False
    show(Section("Hardware", [*check_devices(torch), *check_threads(torch)]))
    methods, mergekit_error = _imported("mergekit.merge_methods")
    if methods is None:
        advice = f"repair what the message names, or: pip install '{_requirement('mergekit')}'"
        finding = problem(f"mergekit cannot be imported: {mergekit_error}", advice)
        show(Section("Merge method", [finding]))
        return False
    show(Section("Merge method", [*check_registration(methods), check_merge(torch, methods)]))
    return True


def check_versions() -> list[Finding]:
    """Compare what is installed with what cart-plugin and mergekit say they need."""
    findings = []
    try:
        own = metadata.distribution("cart-plugin")
    except metadata.PackageNotFoundError:
        findings.append(
            warning(
                "cart-plugin runs from a folder and is not installed in this environment",
                "pip install cart-plugin; until then start mergekit's commands with "
                "`python -m cart_plugin`",
            )
        )
    else:
        findings.append(ok(f"cart-plugin {own.version}"))
    findings.append(_check_version("Python", platform.python_version(), _python_requirement()))
    findings += [_check_package(name) for name in _PACKAGES]
    return findings


def _check_package(name: str) -> Finding:
    try:
        return _check_version(name, metadata.version(name), _requirement(name))
    except metadata.PackageNotFoundError:
        return problem(f"{name} is not installed", f"pip install '{_requirement(name)}'")


def _check_version(name: str, found: str, requirement: str) -> Finding:
    wanted = requirement.removeprefix(name)
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return warning(
            f"{name} {found}; whether that is supported could not be checked",
            "pip install packaging",
        )
    # Local builds (2.9.1+cpu) and pre-releases of a supported version are as good as it is.
    if SpecifierSet(wanted).contains(found.partition("+")[0], prereleases=True):
        return ok(f"{name} {found}")
    if name == "Python":
        return problem(f"Python {found} is not supported", f"use Python {wanted}")
    return problem(f"{name} {found} is not supported", f"pip install '{requirement}'")


def _python_requirement() -> str:
    try:
        return "Python" + (metadata.metadata("cart-plugin")["Requires-Python"] or "")
    except metadata.PackageNotFoundError:
        return "Python"


def _requirement(name: str) -> str:
    """The requirement on a package, with the bounds of cart-plugin and of mergekit together."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return name
    bounds: set[str] = set()
    for dependent in ("cart-plugin", "mergekit"):
        try:
            lines = metadata.requires(dependent) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            if requirement.name == name and requirement.marker is None:
                bounds.update(str(specifier) for specifier in requirement.specifier)
    return name + ",".join(sorted(bounds, reverse=True))


def _imported(name: str) -> tuple[ModuleType | None, str]:
    """Import a module; if that fails, for whatever reason, say why in one line instead."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:  # a broken package can raise anything
        return None, first_line(error)


def check_registration(methods: ModuleType) -> list[Finding]:
    """Tell whether mergekit knows `cart`, by which route, or else why not.

    Args:
        methods: the module `mergekit.merge_methods`, imported.
    """
    status = hook.status()
    method = _registered(methods)
    if method is None:
        return [_why_not_registered(status)]
    if not type(method).__module__.startswith("cart_plugin"):
        return [
            problem(
                f"the merge method `cart` belongs to {type(method).__module__}, not to cart-plugin",
                "uninstall or rename the other one",
            )
        ]
    if status.route in ("pth", "start"):
        return [ok(f"mergekit knows `cart` (through {_start_up_file().name}, at Python's start)")]
    reason, cure = _why_no_start_up()
    return [
        warning(
            f"mergekit knows `cart` in this process only: {reason}",
            f"{cure}; or start mergekit's commands like this one, for example "
            "`python -m cart_plugin mergekit-yaml recipe.yaml out`",
        )
    ]


def _registered(methods: ModuleType) -> Any:
    try:
        return methods.get("cart")
    except Exception:  # mergekit raises a RuntimeError for an unknown name; an old one anything
        return None


def _why_not_registered(status: hook.Status) -> Finding:
    if status.error:
        cause = status.error.strip().splitlines()[-1]
        return problem(
            f"mergekit does not know `cart`: registering it failed with {cause}",
            f"pip install '{_requirement('mergekit')}', then {_REINSTALL}",
        )
    if not status.installed:
        reason, cure = _why_no_start_up()
        return problem(
            f"mergekit does not know `cart`: {reason}",
            f"{cure}; or start mergekit's commands with `python -m cart_plugin`",
        )
    return problem(
        "mergekit does not know `cart` although the start-up hook ran",
        f"{_REINSTALL}; if that does not help, please report it",
    )


def _why_no_start_up() -> tuple[str, str]:
    """Why Python's start did not install the hook, and the cure."""
    if sys.flags.no_site:
        return "python -S does not read start-up files", "run Python without -S"
    start_up = _start_up_file()
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    if not any(Path(folder, start_up.name).is_file() for folder in folders):
        return f"{start_up.name} is not in this Python's site-packages", _REINSTALL
    return f"this Python did not run {start_up.name}", _REINSTALL


def _start_up_file() -> Path:
    """The start-up file that this Python reads: `.start` since 3.15 (PEP 829), `.pth` before."""
    suffix = ".start" if sys.version_info >= (3, 15) else ".pth"
    return next(Path(hook.__file__).parent.glob(f"*{suffix}"), Path(f"zzz_cart_plugin{suffix}"))


def check_merge(torch: Any, methods: ModuleType) -> Finding:
    """Merge tiny matrices through mergekit and compare with the formula in double precision."""
    try:
        if _registered(methods) is None:
            importlib.import_module("cart_plugin.mergekit").register()
        error = _self_test_error(torch, methods)
    except Exception as failure:  # reporting what a merge would raise is the point
        return problem(
            f"self-test: merging four tiny matrices failed with {first_line(failure)}", _REINSTALL
        )
    fact = f"self-test: relative error {error:.0e} against the formula in double precision"
    if error <= _TOLERANCE:
        return ok(fact)
    return problem(
        f"{fact}, above {_TOLERANCE:.0e}",
        "do not trust merges made here; reinstall torch, and report this if it stays",
    )


def _self_test_error(torch: Any, methods: ModuleType) -> float:
    """Largest error of a merged delta, relative to its norm."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(48, 32, generator=generator) for _ in range(4)]
    ratio, scale = 0.25, 1.5
    parameters = {"rank_ratio": ratio, "lambda": scale}
    merged = methods.merge_tensors(inputs, "cart", parameters=parameters, name="self_test.weight")

    exact = [tensor.double() for tensor in inputs]
    centre = sum(exact) / len(exact)
    delta = torch.zeros_like(centre)
    for tensor in exact:
        u, s, vh = torch.linalg.svd(tensor - centre, full_matrices=False)
        k = int(ratio * len(s))
        delta += scale * (u[:, :k] * s[:k]) @ vh[:k]
    error: float = (torch.linalg.norm(merged.double() - centre - delta) / delta.norm()).item()
    return error
