"""Runs a function in a process that ends when its parent does.

    python -m cart_plugin.execution.child PACKAGE.MODULE:FUNCTION ARGUMENTS

A merge or an evaluation that outlived a killed comparison would write beside its successor.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

_KILL = 9  # SIGKILL, which not every system has a name for


def run(
    function: str,
    arguments: Sequence[str],
    log: Path,
    tell: Callable[[str], None] | None = None,
) -> str:
    """Run a function in a child process until it ends.

    Args:
        function: `package.module:function`, which reads `sys.argv`, as console scripts are.
        arguments: its command line.
        log: receives what it prints.
        tell: receives the last line of that, twice a second.

    Returns:
        The last line of its traceback or output if it fails, and the signal if one has killed it;
        empty if it ends well.
    """
    command = [sys.executable, "-m", __name__, function, *arguments]
    with log.open("w") as output:
        # The pipe is never written to: it closes when this process ends, however it ends.
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            # mergekit-pytorch goes through a set of names: random methods would draw in its order.
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        try:
            code = None
            while code is None:
                try:
                    code = child.wait(timeout=None if tell is None else 0.5)
                except subprocess.TimeoutExpired:
                    if tell is not None:
                        tell(last_line(log))
        except BaseException:
            child.kill()
            child.wait()
            raise
    last = last_line(log)
    if code < 0:  # what it printed last is no reason
        why = " (if not by you, for its memory)" if -code == _KILL else ""
        return f"was killed by signal {-code}{why}" + (f" at: {last}" if last else "")
    return "" if code == 0 else last or f"ended with exit code {code}"


def last_line(log: Path) -> str:
    """The last line of a file that is not blank; of a progress bar, its last state."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # unbuffered: a lock held at exit would be fatal
    os._exit(1)


def _main() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = sys.argv[1:]
    module, _, function = sys.argv[0].partition(":")
    getattr(importlib.import_module(module), function)()


if __name__ == "__main__":
    _main()
