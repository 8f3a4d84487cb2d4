"""Work in small pieces on all cores, with few results waiting at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Run jobs in threads and yield what they return, in their order.

    Reading and numpy's loops let other threads run, so this uses all cores, and reads ahead while somebody writes. At
    most two jobs per core are begun and not yet taken, which bounds the memory that their results need.

    Args:
        jobs: Functions; taken from the iterable in this thread, one by one as they can be started.
    """
    ahead = 2 * cores()
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(cores(), thread_name_prefix="qpipe")
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
