"""Ray, started on this machine or joined while other things are being done.

Ray takes ten seconds to start, its workers take as many again to import torch and mergekit, and so
does the command itself. This module imports neither, so that all of it can go on at once.
"""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

from cart_plugin.errors import CartError, first_line

_OBJECT_STORE = 80_000_000  # bytes, nearly Ray's least: no tensor goes through it
# Ray 2.60 gives its own processes half a minute, which a busy machine may need for the first time.
_LATE = "timed out"
_TRIES = 3
_REACHED = 10.0  # seconds in which a cluster's head answers


def import_ray() -> Any:
    """Ray.

    Raises:
        CartError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise CartError(
            "several workers need Ray, which is not installed here; "
            f"pip install 'cart-plugin[ray]' ({first_line(error)})"
        ) from None
    return ray


class Start:
    """Ray in the making, or made; a Ray that this process has already is taken as it is."""

    def __init__(self, workers: int | None, address: str | None, *, logs: bool = False) -> None:
        """Begin.

        Args:
            workers: how many tasks of one CPU there is room for, on this machine.
            address: of a cluster to join, or `auto`; None starts Ray on this machine.
            logs: whether what workers print is shown.
        """
        self._workers, self._address, self._logs = workers or 1, address, logs
        self._ray: Any = None
        self._error: Exception | None = None
        self._ready, self._over = threading.Event(), threading.Event()
        self._begin(_TRIES)

    def _begin(self, tries: int) -> None:
        # One thread from start to end: the system ends Ray's processes with the thread that has
        # started them.
        self._thread = threading.Thread(target=self._run, args=[tries], daemon=True)
        self._thread.start()

    def ray(self) -> Any:
        """Ray, when it is ready.

        Raises:
            CartError: it is not installed, or cannot start.
        """
        self._ready.wait()
        if self._error is not None:
            raise self._error
        return self._ray

    def end(self) -> None:
        """End what was started here; once is enough."""
        self._over.set()
        self._thread.join()

    def _run(self, tries: int) -> None:
        is_ours = False
        try:
            self._ray = import_ray()
            is_ours = not self._ray.is_initialized() and not self._over.is_set()
            if is_ours:
                self._init(self._ray)
        except Exception as error:
            is_late = self._address is None and _LATE in str(error)
            if is_ours and is_late and tries > 1 and not self._over.is_set():
                self._ray.shutdown()
                self._begin(tries - 1)  # what has come too late ends with this thread
                return
            self._error = error
        self._ready.set()
        self._over.wait()
        if is_ours:  # also if only a part of it has started
            self._ray.shutdown()

    def _init(self, ray: Any) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent home
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as later releases do
        # Of the lowest priority, as Ray has it, workers stand still beside programs that compute.
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("PYTHONHASHSEED", "0")  # mergekit goes through sets
        common = {"log_to_driver": self._logs, "logging_level": "ERROR"}
        try:
            if self._address is not None:
                _reach(self._address)
                ray.init(address=self._address, **common)
                return
            ray.init(
                address="local",
                num_cpus=self._workers,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE,
                **common,
            )
            # Further ones import when they get something to do.
            for _ in range(min(self._workers, os.cpu_count() or 1)):
                ray.remote(_import).options(num_cpus=1).remote()
        except Exception as error:  # a start that takes longer than 30 s raises just that
            where = f"cannot join the Ray cluster at {self._address}"
            what = "cannot start Ray on this machine" if self._address is None else where
            raise CartError(f"{what}: {first_line(error)}") from error


def _reach(address: str) -> None:
    """Look whether anybody listens there: Ray 2.60 tries for ten minutes and more.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACHED).close()


def _import() -> None:
    """Let a worker import what its first part needs, while that is being planned."""
    import cart_plugin.distributed.part  # noqa: F401
