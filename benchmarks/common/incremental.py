"""Results that are written case by case, so that an interrupted benchmark goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.common.cache import write_json
from benchmarks.common.measure import machine

# The files of the plugin that decide what a merge's numbers are and how long it takes.
DECISIVE = (
    *("coefficients.py", "gram.py", "indexing.py", "inputs.py", "krylov.py", "lowrank.py"),
    *("mergekit.py", "merging.py", "precision.py", "subspace.py"),
)


# And what else decides what `mergekit-cart compress` writes.
COMPRESS = ("ranks.py", "compress/*.py")


def plugin_digest() -> str:
    """A hash that changes when a merge by the environment's plugin may give other figures."""
    return digest(DECISIVE)


def digest(patterns: Sequence[str]) -> str:
    """A hash of some of the sources of the environment's plugin."""
    spec = find_spec("cart_plugin")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("cart_plugin is not in this environment: run `make venv`")
    folder = Path(spec.origin).parent
    found = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


def conditions(packages: Sequence[str], **others: Any) -> dict[str, Any]:
    """What has to be equal for figures to be comparable: machine, versions, the plugin's sources.

    Args:
        packages: distributions that take part; those not installed are recorded as missing.
        others: whatever else matters, as JSON.
    """
    return {
        # How busy the machine is changes all the time: cases record that themselves.
        "machine": {name: value for name, value in machine().items() if name != "load_average"},
        "versions": {name: _version(name) for name in packages},
        "cart_plugin_sources": plugin_digest(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("OMP_", "MKL_", "OPENBLAS_", "KMP_"))
        },
        **others,
    }


class Record:
    """A JSON file of conditions and cases, whole at any time.

    Args:
        path: the file.
        current: the conditions of this run, as `conditions` gives them.
        resume: keep the cases of a file that was measured under the same conditions.
        spared: by condition, which cases (by key) it does not bear on: they are kept when it
            changes.

    Attributes:
        cases: what is known, by case. Change it through `put`.
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
        if not resume or not path.exists():
            return
        older = json.loads(path.read_text())
        changed = [
            name
            for name, value in self.conditions.items()
            if older["conditions"].get(name) != value
        ]
        tests = [(spared or {}).get(name, lambda _: False) for name in changed]
        self.cases = {
            key: case for key, case in older["cases"].items() if all(test(key) for test in tests)
        }
        if len(self.cases) < len(older["cases"]):
            self.discarded = f"measured under other conditions: {', '.join(changed)}"

    def put(self, key: str, value: Any) -> None:
        """Add or replace a case, in the file too."""
        self.cases[key] = value
        write_json(self.path, {"conditions": self.conditions, "cases": self.cases})


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
