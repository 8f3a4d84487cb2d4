"""Runs batches through a model and into observers; the same in one process and in many."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy.typing as npt

from ...calibrate.errors import DataError
from ...calibrate.stats.extrema import as_float32, measure
from ..graph import Model
from .budget import Budget
from .job import Job
from .observe import Observers, Stats
from .probe import Batch, Probe

_MAX_COUNTERS = 8
_LARGE = 1 << 15  # values; below, handing an array to another thread costs as much as counting it


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
        self._budget = Budget(self._probe, job.tensor_bytes, job.batch_bytes)
        # Flat tensors have no channels any more.
        self._details = {name: d for name, d in job.details.items() if name not in self._probe.lifted}
        self._counters = ThreadPoolExecutor(job.threads or min(os.cpu_count() or 1, _MAX_COUNTERS))
        self.tensors = self._probe.watched
        self.not_covered = self._probe.not_covered

    def observers(self) -> Observers:
        """Return observers that have seen nothing."""
        return Observers(self.tensors, self._details, self._probe.sentinels, self._probe.same)

    def observe(self, batch: Batch, observers: Observers) -> None:
        """Run one batch and count its activations; `settle` completes the observers.

        Raises:
            DataError: The batch does not fit, or an output of the model is not finite.
            ModelError: The model fails, or would take too much memory.
        """
        for piece in self._budget.pieces(batch):
            self._observe(piece, observers)

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
                self._observe(piece, observers)
                if self._details:
                    results.append(observers.result())
                    observers = self.observers()
        self.settle(observers)
        return [*results, observers.result()]

    def _observe(self, piece: Batch, observers: Observers) -> None:
        counting = []
        for name, array, is_output in self._probe.run(piece):
            if is_output:
                self._judge_output(name, array)
            elif array.size >= _LARGE:  # numpy counts without holding Python's lock
                counting.append(self._counters.submit(observers.update, name, array))
            else:
                observers.update(name, array)
            del array
        for done in counting:
            done.result()
        if self._probe.counters is not None:
            # After each run, so that the float sums of all runs are added in one and the same order.
            observers.add(self._probe.counters.take_sums())

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
