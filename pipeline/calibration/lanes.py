"""Batches in lanes: some at a time, each in a thread of its own, and what they give in the order of the data.

Small operators leave cores idle, and Python runs on one of them only: batches side by side use what is left.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import psutil

from ..graph.parallel import cores

T = TypeVar("T")
MOST_LANES = 4
"""How many batches run at a time, at most: each takes the memory of its activations."""
Hold = Callable[[int], bool]
"""Told how many steps have begun and not been yielded: whether no further one is to begin."""


def processors() -> int:
    """Return how many cores this process may use, two that share one counted once, as ONNX Runtime does."""
    return min(cores(), psutil.cpu_count(logical=False) or cores())


def lanes_for(threads: int | None) -> int:
    """Return how many batches are to run at a time in a process of so many threads, None for those of the machine."""
    return min(threads or processors(), MOST_LANES)


def never(_ahead: int) -> bool:
    """Hold nothing."""
    return False


def in_lanes(steps: Iterator[Callable[[], T]], lanes: int, hold: Hold = never) -> Iterator[tuple[T, bool]]:
    """Run steps in threads; yield what they return, in their order, and whether no later step has begun.

    An error comes when the steps before it have been yielded, whether the step raised it or the iterable.

    Args:
        steps: Taken in this thread, one by one, at most one more than can run.
        lanes: How many run at a time.
        hold: While it says so, no step begins beside another.
    """
    if lanes == 1:
        yield from ((step(), True) for step in steps)
        return
    waiting: deque[Future[T]] = deque()
    failure: Exception | None = None
    ended = False
    pool = ThreadPoolExecutor(lanes, thread_name_prefix="qpipe")
    try:
        while True:
            while not ended and len(waiting) <= lanes and not (waiting and hold(len(waiting))):
                try:
                    waiting.append(pool.submit(next(steps)))
                except StopIteration:
                    ended = True
                except Exception as error:  # noqa: BLE001 - the data's own, handed on
                    failure, ended = error, True
            if not waiting:
                break
            result = waiting.popleft().result()
            yield result, not waiting
    finally:
        pool.shutdown(cancel_futures=True)
    if failure is not None:
        raise failure


class Room:
    """Lets work in while all that is in takes at most ``limit`` bytes; work that alone takes more is in alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def of(self, nbytes: int) -> Iterator[None]:
        """Wait for room, and hold it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + nbytes <= self._limit)
            self._taken += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._taken -= nbytes
                self._changed.notify_all()
