"""Results that are written case by case, so that an interrupted benchmark goes on where it was.

What is known is kept as long as all that decides its numbers is the same: the `REVISION`s of the
plugin's rooms and of the benchmark's own code, packages, settings and data, and, as far as figures
depend on it, the machine. Moved files and changed comments decide nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from benchmarks.common.cache import write_json
from benchmarks.common.measure import machine
from benchmarks.common.provenance import Provenance, distinct, installed, provenance

MERGES = ("linalg", "merging", "mergekit")  # the rooms that decide what a merge gives
MERGES_ADAPTERS = ("linalg", "merging", "adapters")
COMPRESSES = ("linalg", "merging", "checkpoints", "compress")


def revisions(rooms: Sequence[str]) -> dict[str, int]:
    """The revisions of rooms of the plugin, by name."""
    return {room: import_module(f"cart_plugin.{room}").REVISION for room in rooms}


def conditions(
    rooms: Sequence[str], packages: Sequence[str], *, timed: bool = True, **others: Any
) -> dict[str, Any]:
    """What has to be equal for figures to be comparable.

    Args:
        rooms: of the plugin that decide the figures.
        packages: distributions that take part; those not installed are recorded as missing.
        timed: times are measured, so that the machine and its thread pools count.
        others: whatever else matters, as JSON.
    """
    found: dict[str, Any] = {
        "versions": {name: installed(name) for name in packages},
        "revisions": revisions(rooms),
    }
    if timed:
        # How busy the machine is changes all the time: cases record that themselves.
        found["machine"] = {
            name: value for name, value in machine().items() if name != "load_average"
        }
        found["environment"] = {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("OMP_", "MKL_", "OPENBLAS_", "KMP_"))
        }
    return found | others


class Record:
    """A JSON file of conditions, cases and where they come from, whole at any time.

    Args:
        path: the file.
        current: the conditions of this run, as `conditions` gives them.
        resume: keep the cases of a file that was measured under the same conditions.
        spared: by condition, which cases (by key) it does not bear on: they are kept when it
            changes.

    Attributes:
        cases: what is known, by case. Change it through `put` and `drop`.
        discarded: why an older file's cases were not kept, if they were not.
    """

    def __init__(
        self,
        path: Path,
        current: dict[str, Any],
        resume: bool = True,
        spared: Mapping[str, Callable[[str], bool]] | None = None,
    ) -> None:
        self.path = path
        self.conditions = json.loads(json.dumps(current))
        self.cases: dict[str, Any] = {}
        self.discarded: str | None = None
        self._made: dict[str, list[Provenance]] = {}  # by case
        if not resume or not path.exists():
            return
        older = json.loads(path.read_text())
        names = self.conditions | older["conditions"]
        changed = [
            name for name in names if older["conditions"].get(name) != self.conditions.get(name)
        ]
        tests = [(spared or {}).get(name, lambda _: False) for name in changed]
        self.cases = {
            key: case for key, case in older["cases"].items() if all(test(key) for test in tests)
        }
        for one in older["measured"]:
            for key in one["cases"]:
                if key in self.cases:
                    self._made.setdefault(key, []).extend(distinct([one]))
        if len(self.cases) < len(older["cases"]):
            self.discarded = f"measured under other conditions: {', '.join(changed)}"

    @classmethod
    def written(cls, path: Path) -> Record:
        """A file as it was written, under whatever conditions: for reports.

        Raises:
            click.ClickException: there is none.
        """
        if not path.exists():
            raise click.ClickException(f"there is no {path}; run without --report first")
        return cls(path, json.loads(path.read_text())["conditions"])

    @property
    def measured(self) -> list[dict[str, Any]]:
        """Where the cases come from: each provenance with its `cases`, the oldest first.

        A case to which several runs added has several.
        """
        return [
            one | {"cases": [key for key, made in self._made.items() if one in made]}
            for one in distinct(one for made in self._made.values() for one in made)
        ]

    def put(self, key: str, value: Any, *, adds: bool = False) -> None:
        """Write a case, in the file too.

        Args:
            key: its name.
            value: the case, as JSON.
            adds: the value holds what was known of the case, and more.
        """
        self.cases[key] = value
        self._made[key] = distinct([*(self._made.get(key, []) if adds else []), provenance()])
        self._write()

    def drop(self, keys: Sequence[str]) -> None:
        """Forget cases; the file does so with the next `put`."""
        for key in keys:
            del self.cases[key]
            self._made.pop(key, None)

    def _write(self) -> None:
        content = {"conditions": self.conditions, "measured": self.measured, "cases": self.cases}
        write_json(self.path, content)
