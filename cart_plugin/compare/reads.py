"""Which files an evaluator has read: its answer holds as long as they are what they were."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import source_from_cache
from pathlib import Path
from typing import Any

State = list[int]
"""Size and time of a file."""


class Reads:
    """Listens to what this process opens, from its making on: Python cannot stop listening."""

    def __init__(self) -> None:
        self._read: set[str] = set()
        self._written: set[str] = set()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(args[0], (str, bytes)):
            return
        writes = args[2] & (os.O_WRONLY | os.O_RDWR) if isinstance(args[2], int) else 0
        (self._written if writes else self._read).add(os.path.abspath(os.fsdecode(args[0])))

    def files(self, model: str) -> dict[str, State]:
        """What was read and not written, but for Python's own files, the model and what is passing.

        Args:
            model: the folder that was judged.
        """
        here = os.getcwd()
        apart = [sys.prefix, sys.base_prefix, model, "/proc", "/sys", "/dev"]
        if not _inside(here, tempfile.gettempdir()):
            apart.append(tempfile.gettempdir())
        found: dict[str, State] = {}
        for name in sorted({_source(name) for name in self._read - self._written}):
            state = _state(name) if Path(name).is_file() else None
            if state is not None and not any(_inside(name, folder) for folder in apart):
                found[name] = state
        return found


def changed(files: Mapping[str, State]) -> bool:
    """Whether any of the files is not what it was."""
    return any(_state(name) != state for name, state in files.items())


def _state(name: str) -> State | None:
    try:
        held = os.stat(name)
    except OSError:
        return None
    return [held.st_size, held.st_mtime_ns]


def _inside(name: str, folder: str) -> bool:
    return Path(os.path.realpath(folder)) in Path(os.path.realpath(name)).parents


def _source(name: str) -> str:
    """The file of a module for what Python has compiled of it."""
    try:
        return source_from_cache(name) if name.endswith(".pyc") else name
    except ValueError:
        return name
