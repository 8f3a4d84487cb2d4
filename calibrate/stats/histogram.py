"""Histogram over the bits of float32: one pass, no range known in advance, exact under any split or order.

A value belongs to the bin that its upper 16 bits name (its truncation to bfloat16), so 65,536 bins, 2^-7 wide relative
to the value, cover every float there is. Merging is integer addition and therefore exact, commutative and associative.

Letters: ``n`` non-empty bins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .extrema import SENTINEL, Extrema, as_float32, measure

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
U16 = npt.NDArray[np.uint16]

BINS = 65536
_CHUNK = 1 << 16  # values per pass: their bin numbers (512 KiB) stay cached
_SIGN = 0x8000
_ALL_LOW_BITS = 0xFFFF


class Bins(NamedTuple):
    """Non-empty bins in ascending order of value, all float64 ``[n]``.

    ``low`` and ``high`` are the smallest and largest value that the bin can hold, narrowed to the exact minimum and
    maximum at the ends; ``center`` is the middle between them, exactly 0 for the bins of zero.
    """

    low: F64
    high: F64
    center: F64
    counts: F64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Histogram:
    """How often each upper half of a float32 occurred; ``Histogram.empty()`` is the identity of `merge`.

    Attributes:
        ids: uint16 [n], ascending: the upper 16 bits of the values counted; the highest bit is the sign.
        counts: int64 [n], all > 0. Only values that take part in a range are counted here.
        low_bits: Bitwise OR of the lower 16 bits of all counted values: how finely the bins are filled. 0 for data
            that is bfloat16 in truth, whose bins are single values; at most 0xE000 for float16.
        extrema: Exact minimum and maximum, and the counts of NaN, infinities and sentinels.
    """

    ids: U16
    counts: I64
    low_bits: int
    extrema: Extrema

    @classmethod
    def empty(cls) -> Histogram:
        """Return the histogram of no values."""
        return cls(ids=np.zeros(0, np.uint16), counts=np.zeros(0, np.int64), low_bits=0, extrema=Extrema())

    @classmethod
    def of(cls, x: npt.NDArray[Any], sentinel: float = SENTINEL) -> Histogram:
        """Return the histogram of one array of any shape; see `HistogramObserver.update`."""
        observer = HistogramObserver(sentinel=sentinel)
        observer.update(x)
        return observer.result()

    @classmethod
    def from_dense(cls, dense: I64, low_bits: int, extrema: Extrema) -> Histogram:
        """Return the histogram of 65,536 counters indexed by bin id, as a native observer counts them."""
        ids = np.flatnonzero(dense != 0)  # four times as fast on booleans
        return cls(ids=ids.astype(np.uint16), counts=dense[ids], low_bits=low_bits, extrema=extrema)

    @property
    def lo(self) -> float:
        """Exact smallest counted value, 0 when nothing was counted."""
        return self.extrema.lo

    @property
    def hi(self) -> float:
        """Exact largest counted value, 0 when nothing was counted."""
        return self.extrema.hi

    @property
    def amax(self) -> float:
        """Exact largest magnitude."""
        return self.extrema.amax

    @property
    def finite(self) -> int:
        """Number of values counted."""
        return self.extrema.finite

    @property
    def total(self) -> int:
        """Number of values seen, whatever they were."""
        return self.extrema.total

    @property
    def nonfinite(self) -> int:
        """Number of NaN, +Inf and -Inf."""
        return self.extrema.nonfinite

    @property
    def sentinel(self) -> int:
        """Number of mask sentinels."""
        return self.extrema.sentinel

    @property
    def zero(self) -> int:
        """Number of zeros of either sign, subnormals below 2^-133 (9.2e-41) included."""
        return int(self.counts[(self.ids & np.uint16(_SIGN - 1)) == 0].sum())

    def bins(self, coarseness: int = 0) -> Bins:
        """Return the non-empty bins in ascending order of value.

        Args:
            coarseness: Join bins whose ids differ in this many low bits only: 2 makes them four times as wide.
        """
        keys = self.ids >> np.uint16(coarseness)
        first = np.flatnonzero(np.diff(keys, prepend=np.int64(-1)))
        last = np.append(first[1:], len(keys))[: len(first)] - 1
        counts = np.add.reduceat(self.counts, first) if len(first) else self.counts
        split = int(np.searchsorted(self.ids[first], _SIGN))
        order = np.concatenate([np.arange(len(first) - 1, split - 1, -1), np.arange(split)])
        near = (self.ids[first][order].astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
        far_bits = (self.ids[last][order].astype(np.uint32) << np.uint32(16)) | np.uint32(self.low_bits)
        far = np.where(near == 0, 0.0, far_bits.view(np.float32).astype(np.float64))
        low = np.clip(np.minimum(near, far), self.lo, self.hi)
        high = np.clip(np.maximum(near, far), self.lo, self.hi)
        return Bins(low, high, (low + high) / 2, counts[order].astype(np.float64))

    def absolute(self) -> Histogram:
        """Return the histogram of the magnitudes; its `lo` is only a lower bound when both signs occur."""
        counts = np.zeros(_SIGN, np.int64)
        np.add.at(counts, self.ids & np.uint16(_SIGN - 1), self.counts)
        extrema = dataclasses.replace(self.extrema, lo=max(self.lo, -self.hi, 0.0), hi=self.amax)
        return Histogram.from_dense(counts, self.low_bits, extrema)

    def merge(self, other: Histogram) -> Histogram:
        """Return the histogram of both streams; exact, commutative and associative."""
        ids, place = np.unique(np.concatenate([self.ids, other.ids]), return_inverse=True)
        counts = np.zeros(len(ids), np.int64)
        np.add.at(counts, place, np.concatenate([self.counts, other.counts]))
        return Histogram(
            ids=ids,
            counts=counts,
            low_bits=self.low_bits | other.low_bits,
            extrema=self.extrema.merge(other.extrema),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        return (
            np.array_equal(self.ids, other.ids)
            and np.array_equal(self.counts, other.counts)
            and (self.low_bits, self.extrema) == (other.low_bits, other.extrema)
        )

    __hash__ = None  # type: ignore[assignment]


def _counters() -> I64:
    """Return zeros that take memory where they are written; np.zeros may be given used memory and clear all of it."""
    memory = mmap.mmap(-1, 8 * BINS, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.int64)


class HistogramObserver:
    """Counts arrays into a `Histogram`.

    A counter per bin, in memory that the system gives page by page when a counter in it is first met: less than
    100 KB for most activations, instead of 512 KB.

    Args:
        sentinel: Magnitude from which finite values are masks and left out.
    """

    def __init__(self, sentinel: float = SENTINEL) -> None:
        self._sentinel = sentinel
        self._counts = _counters()
        self._low_bits = 0
        self._extrema = Extrema()
        self._lock = threading.Lock()

    def update(self, x: npt.NDArray[Any]) -> None:
        """Count every value of ``x``, of any shape. Several threads may do so at a time.

        Args:
            x: float32, float16, bfloat16 (both widened without loss) or float64, which is rounded to float32 first;
                finite float64 values beyond float32 count as sentinels.

        Raises:
            TypeError: ``x`` holds no floating-point numbers.
        """
        flat = as_float32(x)
        for first in range(0, flat.size, _CHUNK):
            kept, extrema = measure(flat[first : first + _CHUNK], self._sentinel)
            low_bits = self._low_bits
            if low_bits != _ALL_LOW_BITS:
                low_bits = int(np.bitwise_or.reduce(kept.view(np.uint32))) & _ALL_LOW_BITS
            # The upper halves: every platform of ONNX Runtime is little-endian.
            ids = kept.view(np.uint16)[1::2].astype(np.intp)
            with self._lock:
                self._extrema = self._extrema.merge(extrema)
                self._low_bits |= low_bits
                np.add.at(self._counts, ids, 1)

    def add(self, histogram: Histogram) -> None:
        """Count every value that ``histogram`` has counted."""
        self._counts[histogram.ids] += histogram.counts
        self._low_bits |= histogram.low_bits
        self._extrema = self._extrema.merge(histogram.extrema)

    def result(self) -> Histogram:
        """Return the statistics so far; the observer can go on."""
        return Histogram.from_dense(self._counts, self._low_bits, self._extrema)
