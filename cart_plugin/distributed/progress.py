"""How far a merge is, over all workers: each leaves its state in a small file, one a part.

Files, because workers and whoever waits for them share a file system and maybe nothing else; and a
worker that was killed cannot be asked which tensor it had in hand.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cart_plugin.checkpoints.files import read_json, write_json

_INTERVAL = 0.3  # seconds between two states of a worker
_LARGE = (
    100_000_000  # bytes of work that is told at once, whatever the time: it may kill the worker
)


@dataclass(frozen=True)
class State:
    """How far a merge is.

    Attributes:
        tensors: made, or found made.
        read: bytes of inputs.
        written: bytes of the result.
        found: bytes of the result that were there already.
    """

    tensors: int = 0
    read: int = 0
    written: int = 0
    found: int = 0


class Step:
    """A part in the making, as its worker counts it; from several threads."""

    def __init__(self, folder: Path, number: int) -> None:
        """Start at nothing; `folder` takes the file."""
        self._file = _file(folder, number)
        self._state = {"tensor": "", "tensors": 0, "read": 0, "written": 0, "found": 0}
        self._told = 0.0

    def read(self, count: int) -> None:
        """Count bytes of inputs."""
        self._state["read"] += count  # type: ignore[operator]

    def wrote(self, count: int) -> None:
        """Count bytes of the result."""
        self._state["written"] += count  # type: ignore[operator]

    def start(self, tensor: str, peak: int) -> None:
        """Say which tensor is in hand, and how many bytes of memory it may take."""
        self._state["tensor"] = tensor
        if peak > _LARGE or time.monotonic() - self._told > _INTERVAL:
            self.flush()

    def done(self, count: int) -> None:
        """Count tensors."""
        self._state["tensors"] += count  # type: ignore[operator]

    def skip(self, tensors: int, count: int) -> None:
        """Count a whole part that was there already."""
        self._state |= {"tensors": tensors, "found": count}
        self.flush()

    def flush(self) -> None:
        """Leave the state for those who wait."""
        self._told = time.monotonic()
        with suppress(OSError):  # of a full disk the part itself will tell
            write_json(self._file, dict(self._state))


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.json"


def total(folder: Path, numbers: Iterable[int]) -> State:
    """The state of some parts together."""
    sums = dict.fromkeys(("tensors", "read", "written", "found"), 0)
    for number in numbers:
        with suppress(OSError, ValueError):  # not begun
            state = read_json(_file(folder, number))
            for name in sums:
                sums[name] += int(state[name])
    return State(**sums)


def in_hand(folder: Path, number: int) -> str:
    """The tensor that a part's worker had in hand last; empty if that is not known."""
    try:
        return str(read_json(_file(folder, number))["tensor"])
    except (OSError, ValueError, KeyError):
        return ""
