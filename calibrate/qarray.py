"""Quantized arrays, and the only place in qpipe that rounds.

``real = scale * (q - zero_point)``; ``q = saturate(round_half_even(real / scale) + zero_point)``, in that order:
ONNX adds the zero point *after* rounding, and rounding after adding gives other codes at ties.

Source: ONNX operators QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .formats import Format
from .granularity import PER_TENSOR, Granularity

F32 = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

SMALLEST_SCALE = np.float32(2.0**-126)
"""Smallest normal float32: a subnormal scale loses its bits, or becomes zero, on hardware that flushes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """How one tensor is to be quantized; says nothing about data.

    Attributes:
        format: Number type of the codes.
        granularity: Which elements share a scale.
        symmetric: Zero maps to the middle of the codes (0 when signed, 2^(bits-1) when unsigned).
        narrow_range: Drop the lowest code, so that the range is symmetric: -127..127.
        reduce_bits: Bits given up so that integer kernels which saturate stay exact (1 = "7-bit weights").
    """

    format: Format
    granularity: Granularity = PER_TENSOR
    symmetric: bool = True
    narrow_range: bool = False
    reduce_bits: int = 0

    @property
    def qmin(self) -> float:
        """Smallest code in use."""
        low = self.format.qmin
        if self.format.is_integer and self.reduce_bits:
            middle = 0 if self.format.is_signed else 2 ** (self.format.bits - 1)
            low = middle + (low - middle) / 2**self.reduce_bits
        return low + 1 if self.narrow_range and self.format.is_integer else low

    @property
    def qmax(self) -> float:
        """Largest code in use."""
        high = self.format.qmax
        if self.format.is_integer and self.reduce_bits:
            middle = 0 if self.format.is_signed else 2 ** (self.format.bits - 1)
            high = middle + (high + 1 - middle) / 2**self.reduce_bits - 1
        return high

    @property
    def middle(self) -> int:
        """Code of real zero in a symmetric scheme."""
        if not self.format.is_integer or self.format.is_signed:
            return 0
        return int(2 ** (self.format.bits - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """A real interval per scale: ``lo``, ``hi`` [scale_shape], finite, ``lo <= 0 <= hi``."""

    lo: F32
    hi: F32

    @classmethod
    def of(cls, lo: npt.ArrayLike, hi: npt.ArrayLike) -> Range:
        """Build a range, widened to contain 0.

        Raises:
            ValueError: A bound is not finite.
        """
        low = np.minimum(np.asarray(lo, dtype=np.float32), np.float32(0))
        high = np.maximum(np.asarray(hi, dtype=np.float32), np.float32(0))
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError("a range must be finite")
        return cls(lo=low, hi=high)

    @property
    def amax(self) -> F32:
        """Largest magnitude, [scale_shape]."""
        return np.maximum(-self.lo, self.hi)


@dataclass(frozen=True, slots=True, kw_only=True)
class QParams:
    """Scale and zero point.

    Attributes:
        scale: float32 [scale_shape], finite, normal, > 0.
        zero_point: Codes [scale_shape] of the format's dtype, None when it is 0 everywhere on a signed format.
        spec: The spec that they belong to.
    """

    scale: F32
    zero_point: Array | None
    spec: Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class QArray:
    """Codes ``q [shape]`` and what they mean."""

    q: Array
    params: QParams


def params_from_range(rng: Range, spec: Spec) -> QParams:
    """Turn real intervals into scales and zero points.

    A range of zero width (an all-zero tensor) gets scale 1: zero stays exactly zero.

    Args:
        rng: ``lo``, ``hi`` [scale_shape].
        spec: Format and symmetry.

    Returns:
        Parameters with ``scale`` [scale_shape] and a zero point such that real 0 has a code of its own.
    """
    lo, hi = rng.lo.astype(np.float64), rng.hi.astype(np.float64)
    if not spec.format.is_integer:
        return QParams(scale=_normal(np.maximum(-lo, hi) / spec.qmax), zero_point=None, spec=spec)
    if spec.symmetric:
        low_span, high_span = spec.middle - spec.qmin, spec.qmax - spec.middle
        # The narrower half of the codes must hold the larger magnitude, unless the data is one-sided there.
        scale = _normal(np.maximum(-lo, hi) / min(low_span, high_span))
        zero = None if spec.middle == 0 else np.full(scale.shape, spec.middle, spec.format.dtype)
        return QParams(scale=scale, zero_point=zero, spec=spec)
    scale = _normal((hi - lo) / (spec.qmax - spec.qmin))
    zero_real = np.clip(np.rint(spec.qmin - lo / scale.astype(np.float64)), spec.qmin, spec.qmax)
    return QParams(scale=scale, zero_point=np.asarray(zero_real).astype(spec.format.dtype), spec=spec)


def _normal(scale: npt.NDArray[np.float64]) -> F32:
    scale32 = np.asarray(scale).astype(np.float32)
    return np.asarray(np.where(scale32 == 0, np.float32(1), np.maximum(scale32, SMALLEST_SCALE)))


def minmax_range(x: Array, granularity: Granularity) -> Range:
    """Return the smallest and largest value per scale of ``x [shape]``, as a `Range` [scale_shape]."""
    if x.size == 0:
        zeros = np.zeros(granularity.scale_shape(x.shape), dtype=np.float32)
        return Range(lo=zeros, hi=zeros)
    return Range.of(granularity.reduce(x, np.minimum), granularity.reduce(x, np.maximum))


def quantize(x: Array, params: QParams) -> QArray:
    """Quantize ``x [shape]`` as ONNX QuantizeLinear does: divide, round half to even, add, saturate."""
    spec = params.spec
    scale = spec.granularity.spread(params.scale, x.shape)
    scaled = np.asarray(x, dtype=np.float32) / scale
    if not spec.format.is_integer:
        codes = np.clip(scaled, spec.qmin, spec.qmax).astype(spec.format.dtype)
        return QArray(q=codes, params=params)
    rounded = np.rint(scaled)
    if params.zero_point is not None:
        rounded = rounded + spec.granularity.spread(params.zero_point.astype(np.float32), x.shape)
    return QArray(q=np.clip(rounded, spec.qmin, spec.qmax).astype(spec.format.dtype), params=params)


def dequantize(qarray: QArray) -> F32:
    """Return ``scale * (q - zero_point)`` [shape] in float32."""
    params = qarray.params
    granularity = params.spec.granularity
    codes = qarray.q.astype(np.float32)
    if params.zero_point is not None:
        codes = codes - granularity.spread(params.zero_point.astype(np.float32), codes.shape)
    return np.asarray(codes * granularity.spread(params.scale, codes.shape), dtype=np.float32)


def fake_quant(x: Array, params: QParams) -> F32:
    """Quantize and dequantize ``x [shape]``: the values that the quantized model computes with."""
    return dequantize(quantize(x, params))
