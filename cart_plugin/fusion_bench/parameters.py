"""Checks of methods' parameters, before any model is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from numbers import Real
from pathlib import Path

from torch import nn

from cart_plugin.errors import CartError


def is_number(value: object) -> bool:
    """Whether a parameter is a finite number."""
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value)  # type: ignore[arg-type]


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse what is no whole number, or below the least one.

    Raises:
        CartError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CartError(f"{name} must be a whole number from {least} on, got {value!r}")


def check_rate(name: str, value: object) -> None:
    """Refuse what is no positive number.

    Raises:
        CartError: it is not.
    """
    if not is_number(value) or value <= 0:  # type: ignore[operator]
        raise CartError(f"{name} must be a positive number, got {value!r}")


def check_path(name: str, given: object) -> None:
    """Refuse what is no path.

    Raises:
        CartError: it is not.
    """
    if given is not None and (not isinstance(given, (str, Path)) or not str(given)):
        raise CartError(f"{name} must be the path of a file, got {given!r}")


def check_writable(name: str, path: Path) -> None:
    """Refuse what is no place for a file.

    Raises:
        CartError: it is not.
    """
    parent = next((one for one in path.absolute().parents if one.exists()), None)
    if path.is_dir():
        raise CartError(f"{name}: {path} is a folder, give a file in it")
    if parent is None or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CartError(f"{name}: {path} cannot be written: {parent} is no folder to write in")


def check_tasks(names: Iterable[str]) -> None:
    """Refuse tasks' names that FusionBench's `SwitchModule` cannot hold, or takes for one.

    Raises:
        CartError: there are some.
    """
    taken: dict[str, str] = {}
    for name in names:
        # As 0.2.33 writes them, into a `ModuleDict`.
        held = name.strip().lower().replace("-", "_").replace("/", "_")
        if not held or "." in held or hasattr(nn.ModuleDict(), held):
            raise CartError(
                f"a task cannot be called {name!r}: FusionBench's switch of heads and models takes "
                "no dots and no words that torch's modules use; give it another name"
            )
        if held in taken:
            raise CartError(
                f"FusionBench's switch of heads and models takes the tasks {taken[held]!r} and "
                f"{name!r} for one: capitals do not count there, and - and / are _; rename one"
            )
        taken[held] = name
