"""Observing in several processes, on one machine (loky) or on a cluster (Dask, Ray), by joblib.

Because statistics merge exactly and float sums are added in the order of the batches, any number of processes finds
what one would have found. The cluster's own scheduler does the work of a lost process again.
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
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from ...calibrate.errors import EnvironmentError_
from ..graph import load
from .cluster import joblib
from .job import Job
from .observe import Stats
from .probe import Batch
from .runner import Runner

_ALONE = threading.Lock()
"""Threads of a cluster's worker share one session, whose counters belong to one task at a time."""


def observe_in_parallel(path: str, job: Job, workers: int, groups: Iterable[list[Batch]]) -> Iterator[list[Stats]]:
    """Yield `Runner.stats` of each group, in order.

    Args:
        path: The model, where every process can read it.
        job: What to observe.
        workers: Number of processes; with a cluster chosen by ``joblib.parallel_config``, tasks at a time.
        groups: Batches that one process does in one go.

    Raises:
        EnvironmentError_: joblib is missing, or a process of this machine died.
    """
    threads = job.threads or max((os.cpu_count() or 1) // workers, 1)
    payload = pickle.dumps(dataclasses.replace(job, threads=threads))
    tasks = (joblib().delayed(_work)(path, payload, group) for group in groups)
    results = _run(tasks, workers)
    try:
        for result in results:  # noqa: UP028 - closed below, not by "yield from"
            yield result
    except RuntimeError as error:
        if type(error).__name__ != "TerminatedWorkerError":
            raise
        raise EnvironmentError_(
            "a calibration process died, most often for lack of memory",
            found=str(error).splitlines()[0],
            do="run again with --resume and fewer --workers, or a smaller --batch",
        ) from error
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whoever stops early knows that work is thrown away
            results.close()


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
