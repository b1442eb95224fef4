"""Several matrices at once on a CPU, each by one thread."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

_MOST_WORKERS = 8
"""Each holds a decomposition in float64."""
_SMALL = 2048
"""The shorter side up to which one thread a matrix is faster than all of them on one after the other."""

T = TypeVar("T")
R = TypeVar("R")


def workers_for(shorter_side: int, device: torch.device | None) -> int:
    """Return how many matrices of at most that shorter side are best decomposed at once.

    LAPACK meets at a barrier thousands of times a matrix. Threads wait there spinning, so that on matrices this small
    several are hardly faster than one; and where another process takes one of the cores, all wait for it every time,
    and a minute's work takes ten.
    """
    if shorter_side > _SMALL or (device is not None and device.type != "cpu"):
        return 1
    return min(_MOST_WORKERS, torch.get_num_threads())


@contextlib.contextmanager
def one_thread_if_small(shorter_side: int, device: torch.device) -> Iterator[None]:
    """A context in which a matrix of that shorter side is worked on by one thread, for the same reason."""
    threads = torch.get_num_threads()
    if workers_for(shorter_side, device) > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_threads(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yield `function(item)` in the order of the items, `workers` at once, without gradients; an error ends it.

    Items are drawn as they are needed, in the caller's thread. PyTorch's threads are shared among the workers.
    """
    if workers < 2:
        yield from map(function, items)
        return
    threads = torch.get_num_threads()

    def without_gradients(item: T) -> R:
        with torch.no_grad():  # of each thread its own
            return function(item)

    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, threads // workers),))
    try:
        for item in items:
            waiting.append(pool.submit(without_gradients, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # some libraries keep one number for all threads
