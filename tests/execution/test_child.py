"""Functions in a process of their own: what is said of one that fails."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from cart_plugin.execution import child


def end() -> None:
    """End this process as the command line says."""
    *_, how = sys.argv
    sys.stderr.write("merging:  30%|###   | 3/10\n")
    sys.stderr.flush()
    if how.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, how))
    if how == "error":
        raise SystemExit("two shapes differ")
    os._exit(int(how))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("0", ""),
        ("error", "two shapes differ"),
        ("3", "merging:  30%|###   | 3/10"),
        (
            "SIGKILL",
            "was killed by signal 9 (if not by you, for its memory) at: merging:  30%|###   | 3/10",
        ),
        ("SIGTERM", "was killed by signal 15 at: merging:  30%|###   | 3/10"),
    ],
)
def test_why_it_ended(how: str, said: str, tmp_path: Path) -> None:
    assert child.run(f"{__name__}:end", [how], tmp_path / "log") == said
