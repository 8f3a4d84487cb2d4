"""The quantization error that a format would make of a tensor, from its histogram alone.

Inside a bin values are taken as evenly spread, and the squared error of the format's own grid is integrated exactly:
in a bin much wider than the step that is step^2/12, in a narrow one the error of its center, and beyond the outermost
code the clipping error. No special case is needed for integer, float8 or float4 grids.

With ``t = x / scale`` in units of codes, ``g_k`` the ascending codes and ``h_k = g_(k+1) - g_k``, the antiderivative of
``(t - nearest code)^2`` is ``F(t) = sum_(j<k) h_j^3 / 12 + (t - g_k)^3 / 3`` where ``g_k`` is nearest to ``t``. The
error is ``sum_bins density (F(high) - F(low))``, which is a dot product of F at the edges with the jumps of density.

Letters: ``n`` non-empty bins, ``e`` edges, ``m`` single values, ``r`` ranges, ``k`` codes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..formats import Format
from ..qarray import Range, Spec, params_from_range
from ..stats.histogram import F64, Histogram

_NARROW = 1e-7  # relative width of a bin that counts as a single value: F would cancel
_TOUCH = 1e-6  # relative distance of neighbours that share an edge: bins end at their largest float32


def expected_mse(histogram: Histogram, rng: Range, spec: Spec) -> float:
    """Return the mean squared error of quantizing the tensor to ``spec`` with the range ``rng``.

    Args:
        histogram: The tensor's values.
        rng: One range for the whole tensor, bounds of one element.
        spec: Format and symmetry; the granularity is not looked at.

    Returns:
        Expected ``(x - fake_quant(x))^2`` over the finite values, in squared units of the tensor; 0 without values.
    """
    return expected_mses(histogram, [rng], spec)[0]


def expected_mses(histogram: Histogram, ranges: Sequence[Range], spec: Spec) -> list[float]:
    """Return `expected_mse` for each of several ranges."""
    several = Range(lo=np.stack([r.lo.reshape(()) for r in ranges]), hi=np.stack([r.hi.reshape(()) for r in ranges]))
    return [float(error) for error in Density.of(histogram).mse(several, spec)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Density:
    """A histogram as a piecewise constant density and single values; exact zeros, which cost nothing, are left out.

    Attributes:
        edges: Where the density changes, in no order, [e].
        jumps: Density before each edge minus density behind it, counts per unit, [e].
        points: Single values, [m].
        counts: How often they occur, [m].
        total: Number of values, zeros included.
    """

    edges: F64
    jumps: F64
    points: F64
    counts: F64
    total: float

    @classmethod
    def of(cls, histogram: Histogram, coarseness: int = 0) -> Density:
        """Return the density of a histogram; ``coarseness`` as in `Histogram.bins`."""
        bins = histogram.bins(coarseness)
        width, size = bins.high - bins.low, np.abs(bins.center)
        wide, single = width > _NARROW * size, (width <= _NARROW * size) & (size > 0)
        low, high = bins.low[wide], bins.high[wide]
        density = bins.counts[wide] / width[wide]
        touches = low[1:] - high[:-1] <= _TOUCH * size[wide][1:]
        # Every bin ends where its neighbour begins if they touch; an end of its own counts otherwise.
        ends = np.append(~touches, True) if len(low) else np.zeros(0, bool)
        begins = -density
        begins[1:] += np.where(touches, density[:-1], 0.0)
        return cls(
            edges=np.concatenate([low, high[ends]]),
            jumps=np.concatenate([begins, density[ends]]),
            points=bins.center[single],
            counts=bins.counts[single],
            total=float(bins.counts.sum()),
        )

    def mse(self, ranges: Range, spec: Spec) -> F64:
        """Return the expected squared error for each of several ranges with bounds [r], as float64 [r]."""
        if not self.total:
            return np.zeros(ranges.lo.shape)
        params = params_from_range(ranges, spec)
        scale = params.scale.astype(np.float64)[:, None]
        zero_point = 0.0 if params.zero_point is None else params.zero_point.astype(np.float64)[:, None]
        distance, base = _nearest(self.edges / scale, spec, zero_point)
        spread = (distance * distance * distance * (1 / 3) + base) @ self.jumps
        error = spread * scale[:, 0]
        if len(self.points):
            distance, _ = _nearest(self.points / scale, spec, zero_point)
            error += (distance * distance) @ self.counts
        # What rounding leaves of an error that is 0 may be negative.
        return np.maximum(error, 0.0) / self.total * scale[:, 0] ** 2


def _nearest(t: F64, spec: Spec, zero_point: F64 | float) -> tuple[F64, F64]:
    """Return, for ``t [r, n]`` in codes, the distance from the nearest code and ``sum_(j<k) h_j^3 / 12``."""
    if spec.format.is_integer:
        code = np.rint(t)
        np.maximum(code, spec.qmin - zero_point, out=code)
        np.minimum(code, spec.qmax - zero_point, out=code)
        return t - code, code * (1 / 12)
    levels, between, base = grid(spec.format)
    index = np.searchsorted(between, t)
    return t - levels[index], base[index]


@functools.cache
def grid(number: Format) -> tuple[F64, F64, F64]:
    """Return the grid of a format that is no integer format, of at most 16 bits.

    Returns:
        Its finite values in ascending order ``[k]``, the midpoints between them ``[k - 1]``, and the running sum of
        the cubed gaps over 12, 0 at value 0, ``[k]``.
    """
    if number.codebook:
        return _grid(np.array(number.codebook))
    codes: npt.NDArray[Any] = np.arange(2**number.bits, dtype=np.uint8 if number.bits <= 8 else np.uint16)
    with np.errstate(invalid="ignore"):
        values = codes.view(np.dtype(number.dtype)).astype(np.float64)
    return _grid(values[np.isfinite(values) & (values >= number.qmin) & (values <= number.qmax)])


def _grid(values: F64) -> tuple[F64, F64, F64]:
    levels = np.unique(values + 0.0)
    gaps = np.diff(levels)
    base = np.concatenate([[0.0], np.cumsum(gaps**3) / 12])
    # Counted from code 0, so that nothing cancels around it, where bins are narrow and their densities huge.
    return levels, levels[:-1] + gaps / 2, base - base[np.searchsorted(levels, 0.0)]
