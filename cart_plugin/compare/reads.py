"""Which files an evaluator has read and which folders it has listed.

Its answer holds as long as they are what they were.
"""

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
"""Size, time and, of files that are not large, a digest: one that was only touched is the same.

Of a folder, whose name ends in a slash here: how many names it holds, no time, and their digest.
"""

_Stat = tuple[int, int, int]  # size, and the times of the content and of the entry

_LARGE = 2**24
_COMPILED = "__pycache__"
# They list every folder that modules may lie in, the current one, too; and this module does.
_IMPORTERS = ("importlib", "_frozen_importlib", "pkgutil", "pkg_resources", __name__)


class Reads:
    """Listens to what this process opens and lists, from its making on: Python cannot stop.

    Files that libraries open outside of Python, and those of other processes, are not heard.
    """

    def __init__(self) -> None:
        with tempfile.TemporaryFile() as file:
            self._begun = os.fstat(file.fileno()).st_ctime_ns  # by the clock of that file system
        # Both as they were when they were opened or listed.
        self._read: dict[str, _Stat | None] = {}
        self._listed: dict[str, tuple[_Stat | None, State | None]] = {}
        self._made: set[str] = set()  # files and folders
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and (name := _name(args[0])):
            if isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
                self._made.add(name)
            elif name not in self._read:
                self._read[name] = _stat(name)
        elif event == "os.rename" and (name := _name(args[1])):
            self._made.add(name)
        elif event == "os.mkdir" and (name := _name(args[0])):
            if not os.path.lexists(name):  # many only make sure that there is one
                self._made.add(name)
        elif event in ("os.listdir", "os.scandir"):
            name = _name("." if args[0] is None else args[0])
            caller = str(sys._getframe(1).f_globals.get("__name__"))
            if name and name not in self._listed and not caller.startswith(_IMPORTERS):
                self._listed[name] = _stat(name), _listing(name)

    def files(self, model: str, results: str) -> dict[str, State]:
        """What was read and listed, but for what this process made, Python's own, and the model.

        Args:
            model: the folder that was judged.
            results: the folder of all rows, which each of them changes.
        """
        apart = [sys.prefix, sys.base_prefix, model, "/proc", "/sys", "/dev"]
        theirs = {Path(os.path.realpath(folder)) for folder in apart}
        passing, out = (Path(os.path.realpath(one)) for one in (tempfile.gettempdir(), results))
        made = {Path(name) for name in list(self._made)}
        outputs = {path.parent for path in made if path.name != _COMPILED} | {passing, out}

        def is_input(name: str, held: _Stat) -> bool:
            real = Path(os.path.realpath(name))
            # Other programs, which this process has started, leave there what it reads then.
            is_passing = passing in real.parents and held[2] > self._begun
            ours = is_passing or not made.isdisjoint((Path(name), *Path(name).parents))
            return not ours and theirs.isdisjoint((real, *real.parents))

        found: dict[str, State] = {}
        for name, opened in list(self._read.items()):
            source = _source(name)
            before = opened if source == name else _stat(source)
            if before is not None and is_input(source, before) and Path(source).is_file():
                # What has changed meanwhile is nobody's: the answer may be of either.
                digest = _digest(source) if (_stat(source) or ())[:2] == before[:2] else "?"
                found[source] = (*before[:2], digest)
        for name, (held, listing) in list(self._listed.items()):
            if held is not None and listing is not None and is_input(name, held):
                real = Path(os.path.realpath(name))
                if outputs.isdisjoint((Path(name), real)) and not _is_of_row(real, out):
                    found[os.path.join(name, "")] = listing
        return dict(sorted(found.items()))


def changed(files: Mapping[str, State]) -> bool:
    """Whether any of the files and folders is not what it was."""
    return any(not _is_same(name, *state) for name, state in files.items())


def _is_same(name: str, size: int, time: int, digest: str) -> bool:
    if name.endswith("/"):
        return _listing(name) == (size, time, digest)
    now = _stat(name)
    if now is None or now[0] != size or digest == "?":
        return False
    return now[1] == time or (digest != "" and _digest(name) == digest)


def _name(path: Any) -> str:
    """A path of an event, absolute; empty for what is none, such as a descriptor."""
    return os.path.abspath(os.fsdecode(path)) if isinstance(path, (str, bytes)) else ""


def _is_of_row(folder: Path, out: Path) -> bool:
    """Whether a folder is a row's or inside it; beside them there may be a user's own."""
    row = next((place for place in (folder, *folder.parents) if place.parent == out), None)
    return row is not None and (row / "evaluation.log").is_file()


def _stat(name: str) -> _Stat | None:
    try:
        held = os.stat(name)
    except OSError:
        return None
    return held.st_size, held.st_mtime_ns, held.st_ctime_ns


def _listing(name: str) -> State | None:
    """Of a folder: what Python compiles into it is none of its data."""
    try:
        names = sorted(entry for entry in os.listdir(name) if entry != _COMPILED)
    except OSError:
        return None
    text = "\0".join(names).encode(errors="surrogateescape")
    return len(names), 0, hashlib.blake2b(text, digest_size=16).hexdigest()


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
