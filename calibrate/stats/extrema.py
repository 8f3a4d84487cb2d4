"""Exact smallest and largest value of a tensor, and how many values could not take part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

SENTINEL = 1e30
"""Magnitude from which a finite value is a mask, not a measurement: exporters write -FLT_MAX where torch has -inf."""

MAX_NONFINITE = 1e-3
"""Share of NaN and infinities in a tensor up to which it still has a range to speak of."""

HALF_SENTINEL = 6e4
"""The same for float16, whose largest value, 65504, stands for -inf there; little beside it is a measurement either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extrema:
    """Minimum, maximum and counts; ``Extrema()`` is the identity of `merge`.

    Attributes:
        finite: Number of values that take part in a range.
        lo: Exact smallest of them, 0 when there are none; never -0.
        hi: Exact largest of them, 0 when there are none; never -0.
        nan: Number of NaN.
        pos_inf: Number of +Inf.
        neg_inf: Number of -Inf.
        sentinel: Number of finite values at or beyond the sentinel threshold in magnitude.
    """

    finite: int = 0
    lo: float = 0.0
    hi: float = 0.0
    nan: int = 0
    pos_inf: int = 0
    neg_inf: int = 0
    sentinel: int = 0

    @property
    def total(self) -> int:
        """Number of values seen, whatever they were."""
        return self.finite + self.sentinel + self.nonfinite

    @property
    def nonfinite(self) -> int:
        """Number of NaN, +Inf and -Inf."""
        return self.nan + self.pos_inf + self.neg_inf

    @property
    def amax(self) -> float:
        """Largest magnitude among the finite values."""
        return max(-self.lo, self.hi)

    def merge(self, other: Extrema) -> Extrema:
        """Return the extrema of both streams; exact, commutative and associative."""
        one, two = (self if self.finite else other), (other if other.finite else self)
        return Extrema(
            finite=self.finite + other.finite,
            lo=min(one.lo, two.lo),
            hi=max(one.hi, two.hi),
            nan=self.nan + other.nan,
            pos_inf=self.pos_inf + other.pos_inf,
            neg_inf=self.neg_inf + other.neg_inf,
            sentinel=self.sentinel + other.sentinel,
        )


def as_float32(x: npt.NDArray[Any]) -> F32:
    """Return ``x`` of any shape as contiguous float32 ``[size]``.

    float16 and bfloat16 widen without loss. float64 is rounded; what is finite there but not in float32 becomes the
    largest float32, so that it counts as a sentinel and not as an infinity.

    Raises:
        TypeError: ``x`` holds no floating-point numbers.
    """
    if x.dtype.kind not in "fV":
        raise TypeError(f"statistics are taken of floating-point arrays, not of {x.dtype}")
    flat = np.ascontiguousarray(x).reshape(-1)
    if flat.dtype != np.float64:
        return flat.astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        narrow = flat.astype(np.float32)
    overflowed = np.isinf(narrow) & np.isfinite(flat)
    narrow[overflowed] = np.copysign(np.finfo(np.float32).max, narrow[overflowed])
    return narrow


def measure(x: F32, sentinel: float = SENTINEL) -> tuple[F32, Extrema]:
    """Separate measurements from everything else.

    Args:
        x: float32 [size].
        sentinel: Magnitude from which a finite value is left out.

    Returns:
        The values that take part (``x`` itself when all do, no copy) and the extrema of ``x``.
    """
    if x.size == 0:
        return x, Extrema()
    lo, hi = float(x.min()), float(x.max())
    if -sentinel < lo and hi < sentinel:  # also false when either is NaN
        return x, Extrema(finite=x.size, lo=lo + 0.0, hi=hi + 0.0)
    kept = x[np.abs(x) < sentinel]
    nan, pos_inf, neg_inf = (int(np.count_nonzero(m)) for m in (np.isnan(x), x == np.inf, x == -np.inf))
    return kept, Extrema(
        finite=kept.size,
        lo=float(kept.min()) + 0.0 if kept.size else 0.0,
        hi=float(kept.max()) + 0.0 if kept.size else 0.0,
        nan=nan,
        pos_inf=pos_inf,
        neg_inf=neg_inf,
        sentinel=x.size - kept.size - nan - pos_inf - neg_inf,
    )
