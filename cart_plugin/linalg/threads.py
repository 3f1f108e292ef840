"""Several matrices side by side on torch's threads, instead of one after the other on all of them.

A decomposition is a chain of small products and factorisations, each of which waits for its slowest
thread: one after the other on all threads suffers where another process keeps a core busy. So a
matrix gets as many threads as its size is worth (`worth`), whatever the machine, and the others
take other matrices. scipy's products have threads of their own, one a core, and here as many as
torch has.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

_T = TypeVar("_T")
_R = TypeVar("_R")

SIDE_BY_SIDE = 2**24
"""Entries of all matrices that are decomposed at a time on CPUs, unless a single one has more: a
large one keeps several threads busy by itself, and copies of large ones would add up."""

_ENTRIES_A_THREAD = 2**20  # `python -m benchmarks.solvers.threads`


def worth(m: int, n: int) -> int:
    """How many threads an ``(m, n)`` matrix gets at most."""
    return max(1, m * n // _ENTRIES_A_THREAD)


def at_a_time(items: int, most: int) -> int:
    """How many of some items `side_by_side` has in the works: as many as torch has threads.

    Args:
        items: their number.
        most: a limit; one item is always in the works.
    """
    return max(1, min(most, torch.get_num_threads(), items))


def side_by_side(
    work: Callable[[_T], _R], items: Sequence[_T], most: int, threads: int
) -> Iterator[_R]:
    """``work(item)`` of each item, in their order.

    No more are begun than are in the works (`at_a_time`) before the caller has taken the first.
    While the iterator is in use, the caller has a worker's number of threads, and so has scipy.

    Args:
        work: called without autograd, and where there are several at a time in other threads.
        items: what it takes.
        most: items in the works at a time.
        threads: torch's for each of them, at most; those that there are are dealt out evenly.
    """
    count = torch.get_num_threads()
    workers = at_a_time(len(items), most)
    share = min(threads, count // workers)
    torch.set_num_threads(share)
    try:
        # Of all threads together: whoever is one of several side by side leaves it alone.
        with nullcontext() if _place.is_in_a_pool else _blas().limit(limits=share):
            yield from map(work, items) if workers == 1 else _in_a_pool(work, items, workers, share)
    finally:
        torch.set_num_threads(count)


class _Place(threading.local):
    """Whether this thread is one of several side by side."""

    is_in_a_pool = False


_place = _Place()


@cache
def _blas() -> ThreadpoolController:
    """The BLAS of scipy and numpy; torch's, which is part of it, goes by torch's threads."""
    return ThreadpoolController().select(user_api="blas")


def _in_a_pool(
    work: Callable[[_T], _R], items: Sequence[_T], workers: int, share: int
) -> Iterator[_R]:
    def alone(item: _T) -> _R:
        with torch.no_grad():  # a state of each thread
            return work(item)

    def begin() -> None:
        torch.set_num_threads(share)
        _place.is_in_a_pool = True

    pool = ThreadPoolExecutor(workers, initializer=begin)
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
