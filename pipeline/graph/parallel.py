"""Work in small pieces on all cores, with few results waiting at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_LARGEST_FREED = 2**25 - 2**16
"""Just below the largest block for which glibc raises its thresholds."""


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
    _keep_freed_memory()
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


def _keep_freed_memory() -> None:
    """Let the C library keep freed blocks of a few megabytes for the next array.

    glibc gives freed blocks back to the kernel, and getting them again costs several times what numpy then does with
    them, until a block as large has been freed once: that raises its threshold. Elsewhere this does nothing.
    """
    np.empty(_LARGEST_FREED, np.uint8)
