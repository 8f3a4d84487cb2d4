"""Observing in several processes, on one machine (loky) or on a cluster (Dask, Ray), by joblib.

Because statistics merge exactly and float sums are added in the order of the batches, any number of processes finds
what one would have found. The work of a lost process is done again: by the cluster's own scheduler, or here.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from ...calibrate.errors import EnvironmentError_
from ..graph import load
from .cluster import joblib
from .job import Job
from .observe import Stats
from .probe import Batch
from .runner import Runner

_ATTEMPTS = 3

_LOST = ("TerminatedWorkerError", "ActorDiedError", "ActorUnavailableError", "WorkerCrashedError")
"""Errors of loky and Ray, neither of which need be installed, for a process that is gone. Dask does its work again."""

_ALONE = threading.Lock()
"""Threads of a cluster's worker share one session, whose counters belong to one task at a time."""


def observe_in_parallel(
    path: str,
    job: Job,
    workers: int,
    groups: Iterable[list[Batch]],
    warn: Callable[[str], None] | None = None,
) -> Iterator[list[Stats]]:
    """Yield `Runner.stats` of each group, in order.

    Args:
        path: The model, where every process can read it.
        job: What to observe.
        workers: Number of processes; with a cluster chosen by ``joblib.parallel_config``, tasks at a time.
        groups: Batches that one process does in one go.
        warn: Told when a process died and its groups are done again.

    Raises:
        EnvironmentError_: joblib is missing, or processes die whenever they get to one group.
    """
    threads = job.threads or max((os.cpu_count() or 1) // workers, 1)
    payload = pickle.dumps(dataclasses.replace(job, threads=threads))
    work = joblib().delayed(_work)
    deaths = 0  # since the last result
    under_way = _UnderWay(groups)
    while True:
        results = _run((work(path, payload, group) for group in under_way), workers)
        try:
            for result in results:
                under_way.sent.popleft()
                deaths = 0
                yield result
            return
        except Exception as error:
            if type(error).__name__ not in _LOST:
                raise
            deaths += 1
            if deaths == _ATTEMPTS:
                raise EnvironmentError_(
                    f"calibration processes died {deaths} times at the same batches, most often for lack of memory",
                    found=str(error).splitlines()[0],
                    do="run again with --resume and fewer --workers, or a smaller --batch",
                ) from error
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # whoever stops early knows that work is thrown away
                results.close()
        under_way = _UnderWay(under_way.left())
        if warn is not None:
            warn("a calibration process died, most often for lack of memory; its batches are done again")


class _UnderWay:
    """Groups as a pool takes them; those whose results have not come yet can go to the next pool.

    A pool takes them in threads of its own, even while it fails: hence the lock, and an end that holds.

    Attributes:
        sent: Groups that were taken, without those whose result came: the receiver removes them.
    """

    def __init__(self, groups: Iterable[list[Batch]]) -> None:
        self._groups = iter(groups)
        self._lock = threading.Lock()
        self._ended = False
        self.sent: deque[list[Batch]] = deque()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        with self._lock:
            if self._ended:
                raise StopIteration
            group = next(self._groups)
            self.sent.append(group)
            return group

    def left(self) -> Iterator[list[Batch]]:
        """Hand out no more, and return what has no result, in order."""
        with self._lock:
            self._ended = True
            return itertools.chain(self.sent, self._groups)


def _run(tasks: Iterator[Any], workers: int) -> Generator[Any, None, None]:
    """Yield the results of tasks in order, while at most twice as many as there are workers are under way or kept."""
    at_once = 2 * workers
    backend, _ = joblib().parallel.get_active_backend()
    if backend.supports_return_generator:
        yield from joblib().Parallel(n_jobs=workers, return_as="generator", pre_dispatch=at_once, batch_size=1)(tasks)
        return
    with joblib().Parallel(n_jobs=workers, batch_size=1) as pool:  # Ray's pool gives results in lists only
        while some := list(itertools.islice(tasks, at_once)):
            yield from pool(some)


def _work(path: str, payload: bytes, group: list[Batch]) -> list[Stats]:
    is_child = multiprocessing.current_process().name != "MainProcess"
    if is_child and threading.current_thread() is threading.main_thread():
        # Ctrl-C reaches all processes of a terminal; the parent alone decides when to stop.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with _ALONE:
        return _runner(path, payload).stats(group)


@functools.lru_cache(maxsize=1)
def _runner(path: str, payload: bytes) -> Runner:
    job: Any = pickle.loads(payload)
    return Runner(load(path), job)
