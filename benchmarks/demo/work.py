"""The demo's jobs, done by worker processes of one thread that stay from the first to the last.

Two processes of one thread do these jobs (17 tokens an image) faster than one of two threads, and a
worker that stays imports torch, transformers and mergekit once and decodes images once.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.common.recipes import Candidate, Merge, merge
from benchmarks.common.training import one_thread

# Without these, glibc gives the memory of large activations back to the system after each use, and
# the system clears it again: a tenth of fine-tuning's time.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 31), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}

Told = Callable[[float], None]  # takes the share of a job that has just been done
_ticks: Any = None  # in a worker: where shares go


class Workers:
    """Does jobs `count` at a time (0: at once, in this process) and hears how far they are.

    A job is a function whose first argument takes the shares of it that are done.
    """

    def __init__(self, count: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._ticks: Any = queue.SimpleQueue()
        if count < 1:
            _start(self._ticks)
            return
        os.environ |= {name: os.environ.get(name, value) for name, value in _KEEP_MEMORY.items()}
        context = multiprocessing.get_context("spawn")
        self._ticks = context.SimpleQueue()
        self._pool = ProcessPoolExecutor(
            count, context, initializer=_start_worker, initargs=(self._ticks,)
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have `function(told, *arguments)` done."""
        if self._pool is not None:
            return self._pool.submit(_do, function, *arguments)
        future: Future[Any] = Future()
        future.set_result(_do(function, *arguments))
        return future

    def finished(self, futures: Iterable[Future[Any]], told: Told) -> Iterator[Future[Any]]:
        """The futures as they end; `told` gets each job's shares, in all 1 a job."""
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            self.hear(told)
            yield from done

    def hear(self, told: Told) -> None:
        """Pass on the shares that have been done since the last time."""
        while not self._ticks.empty():
            told(self._ticks.get())


def _start(ticks: Any) -> None:
    global _ticks
    _ticks = ticks


def _start_worker(ticks: Any) -> None:
    _start(ticks)
    one_thread()
    os.environ["OMP_NUM_THREADS"] = "1"  # of commands that it starts


def _do(function: Callable[..., Any], *arguments: Any) -> Any:
    done = 0.0

    def told(share: float) -> None:
        nonlocal done
        done += share
        _ticks.put(share)

    result = function(told, *arguments)
    _ticks.put(1 - done)  # what the cache had, and what rounding left
    return result


def prepare_backbone(_told: Told) -> Path:
    """The pretrained encoder's folder."""
    from benchmarks.vision import backbone

    return backbone.prepare_backbone()


def prepare_task(_told: Told, name: str) -> Path:
    """The folder of a task's images, whose sources are in the cache."""
    from benchmarks.vision import tasks

    return tasks.prepare_task(name)


def finetune(told: Told, name: str, seed: int, settings: Any) -> Path:
    """The folder of a task's fine-tuned encoder."""
    from benchmarks.vision.finetune import finetune_task

    return finetune_task(name, seed, settings, told)


def merge_and_validate(
    told: Told,
    candidate: Candidate,
    models: Sequence[Path],
    base: Path,
    tuned: tuple[Sequence[str], int, Any],
    counts: Mapping[str, int],
    fresh: bool,
) -> tuple[Merge, dict[str, float]]:
    """A merge, and its accuracies on the validation images.

    CART's merges are by the command that people type; the other methods' by the function behind it.
    """
    from benchmarks.demo.evaluator import Evaluator

    here = not candidate.method.startswith("cart")
    merged = merge(candidate, models, base, fresh=fresh, here=here)
    told(0.4)
    evaluator = Evaluator.of_tuned(*tuned, counts, fresh)
    return merged, evaluator(merged.folder, "validation", told=lambda share: told(0.6 * share))


def merge_two(_told: Told, candidate: Candidate, models: Sequence[Path], base: Path) -> Path:
    """The folder of a merge that has no setting to choose."""
    return merge(candidate, models, base, here=True).folder


def test(
    told: Told,
    folder: Path,
    names: Sequence[str],
    tuned: tuple[Sequence[str], int, Any],
    counts: Mapping[str, int],
    fresh: bool,
) -> dict[str, float]:
    """An encoder's accuracies on the test images of some tasks."""
    from benchmarks.demo.evaluator import Evaluator

    return Evaluator.of_tuned(*tuned, counts, fresh)(folder, "test", names, told)
