"""Which files an evaluator has read: its answer holds as long as they are what they were."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import source_from_cache
from pathlib import Path
from typing import Any

State = tuple[int, int, str]
"""Size, time and, of files that are not large, a digest: one that was only touched is the same."""

_LARGE = 2**24


class Reads:
    """Listens to what this process opens, from its making on: Python cannot stop listening.

    Files that libraries open outside of Python, and those of other processes, are not heard.
    """

    def __init__(self) -> None:
        self._read: dict[str, tuple[int, int] | None] = {}  # as they were when they were opened
        self._written: set[str] = set()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "os.rename" and isinstance(args[1], (str, bytes)):
            self._written.add(os.path.abspath(os.fsdecode(args[1])))
        if event != "open" or not isinstance(args[0], (str, bytes)):
            return
        name = os.path.abspath(os.fsdecode(args[0]))
        if isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            self._written.add(name)
        elif name not in self._read:
            self._read[name] = _stat(name)

    def files(self, model: str) -> dict[str, State]:
        """What was read and not written, but for Python's own files, the model and what is passing.

        Args:
            model: the folder that was judged.
        """
        apart = [sys.prefix, sys.base_prefix, model, "/proc", "/sys", "/dev"]
        passing = os.path.realpath(tempfile.gettempdir())
        if Path(passing) not in Path(os.path.realpath(os.getcwd())).parents:
            apart.append(passing)
        folders = {Path(os.path.realpath(folder)) for folder in apart}
        found: dict[str, State] = {}
        for name, opened in list(self._read.items()):
            source = _source(name)
            before = opened if source == name else _stat(source)
            if before is None or name in self._written or not Path(source).is_file():
                continue
            if folders.isdisjoint(Path(os.path.realpath(source)).parents):
                # What has changed meanwhile is nobody's: the answer may be of either.
                digest = _digest(source) if _stat(source) == before else "?"
                found[source] = (*before, digest)
        return dict(sorted(found.items()))


def changed(files: Mapping[str, State]) -> bool:
    """Whether any of the files is not what it was."""
    return any(not _is_same(name, *state) for name, state in files.items())


def _is_same(name: str, size: int, time: int, digest: str) -> bool:
    now = _stat(name)
    if now is None or now[0] != size or digest == "?":
        return False
    return now[1] == time or (digest != "" and _digest(name) == digest)


def _stat(name: str) -> tuple[int, int] | None:
    try:
        held = os.stat(name)
    except OSError:
        return None
    return held.st_size, held.st_mtime_ns


def _digest(name: str) -> str:
    """Of the content; empty for a large file."""
    try:
        data = b"" if os.stat(name).st_size > _LARGE else Path(name).read_bytes()
    except OSError:
        return "?"
    return hashlib.blake2b(data, digest_size=16).hexdigest() if data else ""


def _source(name: str) -> str:
    """The file of a module for what Python has compiled of it."""
    try:
        return source_from_cache(name) if name.endswith(".pyc") else name
    except ValueError:
        return name
