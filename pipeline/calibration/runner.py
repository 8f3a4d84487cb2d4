"""Runs batches through a model and into observers; the same in one process and in many."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy.typing as npt

from ...calibrate.errors import DataError
from ...calibrate.stats.extrema import as_float32, measure
from ..graph import Model
from .budget import Budget, Piece
from .job import Job
from .lanes import MOST_LANES, Hold, Room, in_lanes, never
from .observe import Observers, Stats
from .probe import Batch, Probe

_MAX_COUNTERS = 8
_LARGE = 1 << 17  # values; below, handing an array to another thread costs as much as counting it


class Runner:
    """Observes batches.

    Args:
        model: The model; not changed.
        job: What to observe.

    Attributes:
        tensors: Tensors that are observed, in topological order.
        not_covered: Tensors that cannot be observed, and why.
    """

    def __init__(self, model: Model, job: Job) -> None:
        self._job = job
        self._probe = Probe(model, job)
        self._budget = Budget(
            self._probe, job.tensor_bytes, job.batch_bytes // MOST_LANES
        )  # the same pieces in any number of lanes
        self._room = Room(job.batch_bytes)
        # Flat tensors have no channels any more.
        self._details = {name: d for name, d in job.details.items() if name not in self._probe.lifted}
        self._counters = ThreadPoolExecutor(job.threads or min(os.cpu_count() or 1, _MAX_COUNTERS))
        self.tensors = self._probe.watched
        self.not_covered = self._probe.not_covered

    def observers(self) -> Observers:
        """Return observers that have seen nothing."""
        return Observers(self.tensors, self._details, self._probe.sentinels, self._probe.same)

    def observe(self, batches: Iterable[Batch], observers: Observers, hold: Hold = never) -> Iterator[bool]:
        """Run batches and count their activations; `settle` completes the observers.

        Args:
            batches: Arrays by input; they must not change once they are handed out.
            observers: What counts.
            hold: See `in_lanes`.

        Yields:
            For each batch, in order, whether the observers have seen it and those before it and nothing else.

        Raises:
            DataError: A batch does not fit, or an output of the model is not finite.
            ModelError: The model fails, or would take too much memory.
        """
        # Cut in this thread: where, depends on the batches before.
        cut = (self._budget.pieces(batch) for batch in batches)
        pieces = ((piece, piece is batch[-1]) for batch in cut for piece in batch)
        steps = (functools.partial(self._observe, piece, is_last, observers) for piece, is_last in pieces)
        for (sums, is_last), is_all in in_lanes(steps, self._probe.lanes, hold):
            observers.add(sums)
            if is_last:
                yield is_all

    def settle(self, observers: Observers) -> None:
        """Bring into ``observers`` what was counted inside the graph since the last time."""
        if self._probe.counters is not None:
            observers.add(self._probe.counters.take(self.tensors))

    def stats(self, batches: Iterable[Batch]) -> list[Stats]:
        """Return statistics whose sum, in this order, is what `observe` of all batches would have counted.

        Integers add up exactly in any grouping. Where float sums are asked for, each run gets an entry of its own, so
        that they are added in the very order in which one process adds them.
        """
        observers = self.observers()
        results = []
        for batch in batches:
            for piece in self._budget.pieces(batch):
                observers.add(self._run(piece.batch, observers))
                if self._details:
                    results.append(observers.result())
                    observers = self.observers()
        self.settle(observers)
        return [*results, observers.result()]

    def _observe(self, piece: Piece, is_last: bool, observers: Observers) -> tuple[Stats, bool]:
        with self._room.of(piece.nbytes):
            return self._run(piece.batch, observers), is_last

    def _run(self, batch: Batch, observers: Observers) -> Stats:
        """Count the activations of a batch; return its float sums that are yet to be added, in order."""
        sums: Stats = {}
        counting = []
        for name, array, is_output in self._probe.run(batch):
            if is_output:
                self._judge_output(name, array)
            elif array.size >= _LARGE:  # most of what counting takes runs without Python's lock
                counting.append(self._counters.submit(self._count, name, array, observers))
            else:
                sums |= self._count(name, array, observers)
            del array
        for counted in counting:
            sums |= counted.result()
        if self._probe.counters is not None:
            sums |= self._probe.counters.take_sums()
        return sums

    def _count(self, name: str, array: npt.NDArray[Any], observers: Observers) -> Stats:
        sums = observers.count(name, array)
        if self._probe.lanes > 1:
            return sums
        observers.add(sums)  # nothing comes before it, and matrices of all tensors would take much memory
        return {}

    def _judge_output(self, name: str, array: npt.NDArray[Any]) -> None:
        if self._job.allow_nonfinite:
            return
        found = measure(as_float32(array), self._job.sentinel)[1]
        if found.nonfinite:
            raise DataError(
                f"the model's output {name!r} is not finite",
                found=f"{found.nan} NaN, {found.pos_inf} +Inf, {found.neg_inf} -Inf of {found.total} values",
                expected="finite outputs; statistics of a model that fails on its data mean nothing",
                do="fix the data or the model, or pass --allow-nonfinite",
            )
