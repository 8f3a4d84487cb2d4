"""From the activations of a batch to `TensorStats`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...calibrate.stats.channel_amax import ChannelAmax
from ...calibrate.stats.extrema import SENTINEL
from ...calibrate.stats.gram import Gram
from ...calibrate.stats.histogram import Histogram, HistogramObserver
from ...calibrate.stats.tokens import Window, as_tokens
from .record import TensorStats

Stats = dict[str, TensorStats]


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """What to collect of a tensor beside its histogram: magnitudes per channel always, and more where asked.

    Attributes:
        axis: Axis of the channels: -1 for the input of a MatMul or Gemm, 1 for that of a Conv.
        window: How a Conv reads the tensor; channels are then the columns of its patches. None for anything else.
        gram: Collect ``XᵀX`` as well, channels x channels float64 numbers.
    """

    axis: int = -1
    window: Window | None = None
    gram: bool = False

    def of(self, x: npt.NDArray[Any], sentinel: float) -> tuple[ChannelAmax, Gram | None]:
        """Return the statistics of one batch."""
        tokens = as_tokens(x, self.axis, self.window, sentinel)
        return ChannelAmax.of(tokens), Gram.of(tokens) if self.gram else None


class TensorObserver:
    """Gathers the statistics of one tensor.

    Args:
        detail: What to collect beside the histogram, None for nothing.
        sentinel: Magnitude from which finite values are masks.
    """

    def __init__(self, detail: Detail | None = None, sentinel: float = SENTINEL) -> None:
        self._detail = detail
        self._sentinel = sentinel
        self._histogram = HistogramObserver(sentinel)
        self._channels: ChannelAmax | None = None
        self._gram: Gram | None = None

    def count(self, x: npt.NDArray[Any]) -> TensorStats | None:
        """Count one batch, and return what has to be added in the order of the batches; None for nothing."""
        if x.size == 0:
            return None
        self._histogram.update(x)
        if self._detail is None:
            return None
        channels, gram = self._detail.of(x, self._sentinel)
        return TensorStats(histogram=Histogram.empty(), channels=channels, gram=gram)

    def add(self, stats: TensorStats) -> None:
        """Take over what another observer has seen."""
        if stats.histogram.total:
            self._histogram.add(stats.histogram)
        self._grow(stats.channels, stats.gram)

    def result(self) -> TensorStats:
        """Return the statistics so far."""
        return TensorStats(histogram=self._histogram.result(), channels=self._channels, gram=self._gram)

    def _grow(self, channels: ChannelAmax | None, gram: Gram | None) -> None:
        if channels is not None:
            self._channels = channels if self._channels is None else self._channels.merge(channels)
        if gram is not None:
            self._gram = gram if self._gram is None else self._gram.merge(gram)


class Observers:
    """One `TensorObserver` per tensor.

    Args:
        tensors: Names, in the order of the result.
        details: What to collect beside histograms.
        sentinels: Magnitude from which finite values are masks, by tensor.
        same: Tensors that are not observed because they hold the values of another one, and which.
    """

    def __init__(
        self,
        tensors: list[str],
        details: Mapping[str, Detail],
        sentinels: Mapping[str, float],
        same: Mapping[str, str],
    ) -> None:
        self._tensors = tensors
        self._same = same
        self._observers = {n: TensorObserver(details.get(n), sentinels[n]) for n in tensors if n not in same}

    def count(self, name: str, x: npt.NDArray[np.generic]) -> Stats:
        """Count one tensor of one batch, in any thread; return its sums, to be added in the order of the batches."""
        sums = self._observers[name].count(x)
        return {} if sums is None else {name: sums}

    def add(self, stats: Stats) -> None:
        """Take over statistics of other observers."""
        for name, one in stats.items():
            if name not in self._same:
                self._observers[name].add(one)

    def result(self) -> Stats:
        """Return all statistics so far."""
        seen = {name: observer.result() for name, observer in self._observers.items()}
        copies = {name: TensorStats(histogram=seen[source].histogram) for name, source in self._same.items()}
        return {name: copies[name] if name in copies else seen[name] for name in self._tensors}
