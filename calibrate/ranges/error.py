"""The quantization error that a format would make of a tensor, from its histogram alone.

Inside a bin values are taken as evenly spread, and the squared error of the format's own grid is integrated exactly:
in a bin much wider than the step that is step^2/12, in a narrow one the error of its center, and beyond the outermost
code the clipping error. No special case is needed for integer, float8 or float4 grids.

With ``t = x / scale`` in units of codes, ``g_k`` the ascending codes and ``h_k = g_(k+1) - g_k``, the antiderivative of
``(t - nearest code)^2`` is ``F(t) = sum_(j<k) h_j^3 / 12 + (t - g_k)^3 / 3`` where ``g_k`` is nearest to ``t``.

Letters: ``n`` non-empty bins, ``r`` ranges, ``k`` codes.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from ..formats import Format
from ..qarray import Range, Spec, params_from_range
from ..stats.histogram import F64, Bins, Histogram

_NARROW = 1e-4  # codes; the difference of the antiderivative cancels below, and the center's error is as good


def expected_mse(histogram: Histogram, rng: Range, spec: Spec) -> float:
    """Return the mean squared error of quantizing the tensor to ``spec`` with the range ``rng``.

    Args:
        histogram: The tensor's values.
        rng: One range for the whole tensor, bounds of one element.
        spec: Format and symmetry; the granularity is not looked at.

    Returns:
        Expected ``(x - fake_quant(x))^2`` over the finite values, in squared units of the tensor; 0 without values.
    """
    return float(bins_mse(histogram.bins(), Range(lo=rng.lo.reshape(1), hi=rng.hi.reshape(1)), spec)[0])


def bins_mse(bins: Bins, ranges: Range, spec: Spec) -> F64:
    """Return the expected squared error for each of several ranges with bounds [r], as float64 [r]."""
    if not len(bins.counts):
        return np.zeros(ranges.lo.shape)
    params = params_from_range(ranges, spec)
    scale = params.scale.astype(np.float64)[:, None]
    zero_point = 0.0 if params.zero_point is None else params.zero_point.astype(np.float64)[:, None]
    low, high = bins.low / scale, bins.high / scale
    width = high - low
    from_low, base_low = _nearest(low, spec, zero_point)
    from_high, base_high = _nearest(high, spec, zero_point)
    spread = (
        base_high - base_low + (from_high * from_high * from_high - from_low * from_low * from_low) / 3
    ) / np.maximum(width, _NARROW)
    # The distances at both ends agree in a narrow bin, so that their mean is the distance of its center.
    error = np.where(width > _NARROW, spread, ((from_low + from_high) / 2) ** 2)
    return np.asarray(error @ bins.counts / bins.counts.sum() * scale[:, 0] ** 2)


def _nearest(t: F64, spec: Spec, zero_point: F64 | float) -> tuple[F64, F64]:
    """Return, for ``t [r, n]`` in codes, the distance from the nearest code and ``sum_(j<k) h_j^3 / 12``."""
    if spec.format.is_integer:
        code = np.clip(np.rint(t), spec.qmin - zero_point, spec.qmax - zero_point)
        return t - code, code / 12
    levels, between, base = grid(spec.format)
    index = np.searchsorted(between, t)
    return t - levels[index], base[index]


@functools.cache
def grid(number: Format) -> tuple[F64, F64, F64]:
    """Return the grid of a format that is no integer format, of at most 16 bits.

    Returns:
        Its finite values in ascending order ``[k]``, the midpoints between them ``[k - 1]``, and the running sum of
        the cubed gaps over 12 ``[k]``.
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
    return levels, levels[:-1] + gaps / 2, np.concatenate([[0.0], np.cumsum(gaps**3) / 12])
