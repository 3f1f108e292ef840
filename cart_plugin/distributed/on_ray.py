"""Several workers: Ray's, on this machine or on a cluster whose nodes share the folders.

A worker makes one part at a time. One that dies, of whatever, takes nothing with it but the part
in hand, which another makes; one that dies of memory is followed by one that asks for more.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cart_plugin.checkpoints.files import explain
from cart_plugin.distributed import progress
from cart_plugin.distributed.journal import Places
from cart_plugin.distributed.plan import Part
from cart_plugin.distributed.start import Start
from cart_plugin.doctor.machine import size
from cart_plugin.errors import CartError, first_line

_DEATHS = 5  # of workers over one part, until it is the part's fault
_LOSSES = 20  # of nodes over one part: a cluster that loses them as fast does not finish
_CHECK = 3.0  # seconds between two looks at the nodes
_PATIENCE = 60.0  # seconds until it is told that no worker has begun
_ENDING = 10.0  # seconds for workers to end in
_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Workers:
    """What is asked of Ray.

    Attributes:
        count: parts made at once; as many as the cluster has room for if None.
        address: of a cluster, or `auto`; None for Ray on this machine.
        threads: of each worker.
        gpus: each worker's share of one.
    """

    count: int | None
    address: str | None
    threads: int
    gpus: float = 0.0

    @property
    def cpus(self) -> int:
        """What a worker asks for of a cluster's CPUs; here each is one of as many as there are."""
        return 1 if self.address is None else self.threads

    @property
    def surroundings(self) -> dict[str, Any]:
        """Ray's options for a worker's environment.

        Here it is this process's, in which workers are ready beforehand: another one takes new
        processes. A worker sets its threads by itself, too.
        """
        if self.address is None:
            return {}
        variables = dict.fromkeys(_VARIABLES, str(self.threads))
        return {"runtime_env": {"env_vars": {**variables, "PYTHONHASHSEED": "0"}}}


@dataclass(frozen=True)
class _Attempt:
    """A part that a worker is to make, with the bytes of memory that it asks for."""

    number: int
    memory: int
    deaths: int = 0
    losses: int = 0


def make(
    places: Places,
    parts: Sequence[Part],
    workers: Workers,
    start: Start,
    note: Callable[[str], None],
) -> None:
    """Make all parts.

    Args:
        places: the merge's.
        parts: of its result.
        workers: what is asked of Ray.
        start: Ray.
        note: receives a line about each worker that died.

    Raises:
        CartError: one cannot be made, or there is no machine for it. Those that are finished stay.
    """
    ray = start.ray()
    try:
        _Crew(ray, places, parts, workers, note).work()
    except ray.exceptions.RayError as error:  # of Ray itself: its head is gone, or does not answer
        raise CartError(f"Ray has failed: {first_line(error)}") from error


def _task(place: str, number: int) -> str | None:
    """What a worker does; why it could not, in a line, if that is nobody else's to try."""
    from cart_plugin.distributed.part import Workshop

    if not Path(place).is_dir():
        return (
            f"{socket.gethostname()} does not see {place}: all nodes have to share the folder of "
            "the result and those of the models"
        )
    try:
        if place not in _WORKSHOPS:
            _WORKSHOPS.clear()
            _WORKSHOPS[place] = Workshop(Path(place))
        _WORKSHOPS[place].make(number)
    except CartError as error:
        return str(error)
    except OSError as error:
        return explain(error)
    return None


_WORKSHOPS: dict[str, Any] = {}  # of a worker's process, which Ray keeps for the next part


class _Crew:
    """Ray's workers over one merge."""

    def __init__(
        self,
        ray: Any,
        places: Places,
        parts: Sequence[Part],
        workers: Workers,
        note: Callable[[str], None],
    ) -> None:
        self._ray = ray
        self._places = places
        self._parts = parts
        self._workers = workers
        self._note = note
        # The largest first, so that nobody waits for one in the end.
        order = sorted(range(len(parts)), key=lambda number: -parts[number].bytes)
        self._waiting = [_Attempt(number, parts[number].memory) for number in order]
        self._running: dict[Any, _Attempt] = {}
        self._begun = time.monotonic()
        self._is_quiet = True  # no worker has begun, and nobody was told
        self._make = ray.remote(_task)
        # A dead worker's part is asked for anew here, with what its death has taught.
        self._asked = {
            "num_cpus": workers.cpus,
            "num_gpus": workers.gpus,
            "max_retries": 0,
            **workers.surroundings,
        }

    def work(self) -> None:
        """Hand out the parts until all are made."""
        looked = -_CHECK
        try:
            while self._waiting or self._running:
                if time.monotonic() - looked > _CHECK:
                    self._look_at_nodes()
                    self._look_for_workers()
                    looked = time.monotonic()
                while self._waiting and len(self._running) < self._most():
                    self._hand_out(self._waiting.pop(0))
                done, _ = self._ray.wait(list(self._running), timeout=0.5)
                for reference in done:
                    self._take(reference, self._running.pop(reference))
        finally:
            self._end()

    def _end(self) -> None:
        """End the workers, and wait for it: what they write may be removed next."""
        left = list(self._running)
        with suppress(self._ray.exceptions.RayError):  # whatever has failed is on its way up
            for reference in left:
                self._ray.cancel(reference, force=True)
            if left:
                self._ray.wait(left, num_returns=len(left), timeout=_ENDING)

    def _most(self) -> int:
        return self._workers.count or max(1, len(self._parts))

    def _hand_out(self, attempt: _Attempt) -> None:
        memory = min(attempt.memory, self._room)
        task = self._make.options(memory=memory, **self._asked)
        reference = task.remote(str(self._places.folder), attempt.number)
        self._running[reference] = replace(attempt, memory=memory)

    def _look_at_nodes(self) -> None:
        """Know the most memory that can be asked for; ask for less where its node is gone.

        Raises:
            CartError: no node can take a worker. Ray would wait for one.
        """
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        able = [
            node
            for node in nodes
            if node.get("CPU", 0) >= self._workers.cpus and node.get("GPU", 0) >= self._workers.gpus
        ]
        if not able:
            gpu = f" and {self._workers.gpus:g} of a GPU" if self._workers.gpus else ""
            raise CartError(
                f"none of Ray's {len(nodes)} nodes has {self._workers.cpus} CPUs{gpu} for a "
                "worker; ask for less (-j, --gpus), or start more nodes"
            )
        self._room = int(max(node.get("memory", 0) for node in able))
        for reference, attempt in list(self._running.items()):
            if attempt.memory > self._room:
                del self._running[reference]
                self._ray.cancel(reference, force=True)
                self._waiting.insert(0, attempt)

    def _look_for_workers(self) -> None:
        """Say so, once, if none has begun: others have taken what Ray's machines have."""
        is_early = not self._running or time.monotonic() - self._begun < _PATIENCE
        if not self._is_quiet or is_early:
            return
        self._is_quiet = False
        if any(self._places.progress.glob("*.json")):
            return
        wanted = next(iter(self._running.values()))
        gpu = f", {self._workers.gpus:g} of a GPU" if self._workers.gpus else ""
        self._note(
            "no worker has begun yet: they are still being started, or Ray waits for "
            f"{self._workers.cpus} free CPUs{gpu} and {size(wanted.memory)} of memory on one of "
            "its machines (`ray status`)"
        )

    def _take(self, reference: Any, attempt: _Attempt) -> None:
        errors = self._ray.exceptions
        part = self._parts[attempt.number]
        try:
            failed = self._ray.get(reference)
        except (errors.OutOfMemoryError, errors.WorkerCrashedError) as error:
            self._after_death(attempt, error)
        except errors.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, MemoryError) or "can't allocate memory" in str(cause):
                self._after_death(attempt, cause)
                return
            if type(cause).__name__ == "OutOfMemoryError":  # torch's, of a GPU
                raise CartError(
                    f"the GPU's memory is too small for {self._tensor(attempt)} ({part.name}); "
                    "give each worker a whole GPU (--gpus 1), or merge on CPUs"
                ) from None
            raise CartError(f"{part.name}: a worker failed: {first_line(cause)}") from None
        except (errors.RuntimeEnvSetupError, errors.TaskUnschedulableError) as error:
            raise CartError(f"Ray cannot start a worker: {first_line(error)}") from None
        except errors.RayError as error:  # its node is gone
            if attempt.losses + 1 > _LOSSES:
                raise CartError(
                    f"{part.name}: {_LOSSES} nodes were lost: {first_line(error)}"
                ) from None
            self._note(f"a node is lost; {part.name} is made again elsewhere")
            self._waiting.insert(0, replace(attempt, losses=attempt.losses + 1))
        else:
            if failed is not None:
                raise CartError(f"cannot make {part.name}: {failed}")

    def _after_death(self, attempt: _Attempt, error: Exception) -> None:
        """Ask for the part again, and for more memory: systems kill for it without a word.

        Raises:
            CartError: it has been tried often enough.
        """
        part, tensor = self._parts[attempt.number], self._tensor(attempt)
        of_memory = not isinstance(error, self._ray.exceptions.WorkerCrashedError)
        how = "ran out of memory" if of_memory else "was killed (if not by you, for its memory)"
        deaths = attempt.deaths + 1
        if deaths >= _DEATHS:
            raise CartError(
                f"{part.name}: {deaths} workers in turn died; the last one {how} at {tensor}, "
                f"with {size(attempt.memory)} asked for; use fewer workers, machines with more "
                "memory, or smaller shards (--out-shard-size)"
            )
        more = min(attempt.memory * 2, max(self._room, attempt.memory))
        self._note(
            f"a worker {how} at {tensor}; {part.name} is made again, with {size(more)} of memory "
            f"asked for instead of {size(attempt.memory)}"
        )
        self._waiting.insert(0, replace(attempt, memory=more, deaths=deaths))

    def _tensor(self, attempt: _Attempt) -> str:
        held = progress.in_hand(self._places.progress, attempt.number)
        return held or self._parts[attempt.number].largest.name
