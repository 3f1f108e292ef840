"""Several matrices side by side on torch's threads, instead of one after the other on all of them.

A decomposition is a chain of small products and factorisations, each of which waits for its slowest
thread: one after the other on all threads suffers where another process keeps a core busy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

_T = TypeVar("_T")
_R = TypeVar("_R")


def at_a_time(items: int, most: int) -> int:
    """How many of some items `side_by_side` has in the works: as many as torch has threads.

    Args:
        items: their number.
        most: a limit; one item is always in the works.
    """
    return max(1, min(most, torch.get_num_threads(), items))


def side_by_side(
    work: Callable[[_T], _R], items: Sequence[_T], most: int, threads: int | None = None
) -> Iterator[_R]:
    """``work(item)`` of each item, in their order.

    No more are begun than are in the works (`at_a_time`) before the caller has taken the first.
    While the iterator is in use, the caller has a worker's number of threads.

    Args:
        work: called without autograd, and where there are several at a time in other threads.
        items: what it takes.
        most: items in the works at a time.
        threads: torch's for each of them; by default those that there are, dealt out evenly.
    """
    count = torch.get_num_threads()
    workers = at_a_time(len(items), most)
    share = threads or count // workers
    torch.set_num_threads(share)
    try:
        yield from map(work, items) if workers == 1 else _in_a_pool(work, items, workers, share)
    finally:
        torch.set_num_threads(count)


def _in_a_pool(
    work: Callable[[_T], _R], items: Sequence[_T], workers: int, share: int
) -> Iterator[_R]:
    def alone(item: _T) -> _R:
        with torch.no_grad():  # a state of each thread
            return work(item)

    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,))
    waiting: deque[Future[_R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(alone, item))
            if len(waiting) == workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
