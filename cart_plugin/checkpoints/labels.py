"""What to call models that have no names but their folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def told_apart(paths: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart: trainers call every folder `adapter`."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    length = 1
    while length < max(map(len, parts)):
        ends = ["/".join(part[-length:]) for part in parts]
        if len(set(ends)) == len(ends):
            break
        length += 1
    return ["/".join(part[-length:]) for part in parts]
