"""Quantized arrays, and the only place in qpipe that rounds.

``real = scale * (q - zero_point)``; ``q = saturate(round_half_even(real / scale) + zero_point)``, in that order:
ONNX adds the zero point *after* rounding, and rounding after adding gives other codes at ties. A zero point that is no
code (`Spec.float_zero`) is added before: ``q = saturate(round_half_even(real / scale + zero_point))``.

Non-finite values must not reach a quantizer. If one does: infinities saturate; NaN becomes the lowest code of an
integer format (as in ONNX Runtime) and stays NaN in a float format that has one.

Source: ONNX operators QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .formats import FORMATS, Format
from .granularity import PER_TENSOR, Granularity

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

SMALLEST_SCALE = np.float32(2.0**-126)
"""Smallest normal float32: a subnormal scale loses its bits, or becomes zero, on hardware that flushes."""

LARGEST_BOUND = float(np.finfo(np.float32).max) / 2
"""Where ranges end: the outermost code may mean half a step more than the range, and the product must not overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """How one tensor is to be quantized; says nothing about data.

    Attributes:
        format: Number type of the codes.
        granularity: Which elements share a scale.
        symmetric: Zero maps to the middle of the codes (0 when signed, 2^(bits-1) when unsigned).
        narrow_range: Drop the lowest code, so that the range is symmetric: -127..127.
        reduce_bits: Bits given up so that integer kernels which saturate stay exact (1 = "7-bit weights").
        pair_limit: Largest sum of two neighbouring codes of one sign along the summed axis of a weight, 0 for no limit.
            It keeps kernels exact that add two u8*s8 products in 16 bits, at less loss than ``reduce_bits``; the weight
            methods see to it, see `calibrate.weights.pairs`.
        float_zero: Zero points are real numbers (float32), not codes, for operators that subtract them as floats. Real
            0 then has no code of its own.

    Raises:
        ValueError: The block size is not the one that the format prescribes, fewer than 2 bits are left, or codes that
            have no zero points want real ones.
    """

    format: Format
    granularity: Granularity = PER_TENSOR
    symmetric: bool = True
    narrow_range: bool = False
    reduce_bits: int = 0
    pair_limit: int = 0
    float_zero: bool = False

    def __post_init__(self) -> None:
        wanted, given = self.format.block_size, self.granularity.block_size
        if wanted and given != wanted:
            raise ValueError(f"{self.format.name} has blocks of {wanted}, not {given or 'none'}")
        if self.format.is_integer and self.format.bits - self.reduce_bits < 2:
            raise ValueError(f"{self.format.name} less {self.reduce_bits} bits leaves fewer than 2")
        if self.float_zero and (self.symmetric or not self.format.is_integer):
            raise ValueError("only asymmetric integers have zero points that can be real numbers")

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

    @property
    def zero_dtype(self) -> npt.DTypeLike:
        """Type of zero points: that of the codes, or float32."""
        return np.float32 if self.float_zero else self.format.dtype

    @property
    def span(self) -> float:
        """Code (or value) that the largest magnitude of a symmetric range maps to.

        The smaller half of the integer codes counts, for it has to hold the magnitude too. Under the "floor" rule it
        is the largest power of two of the format: the specification takes floor(log2(amax)) less that exponent.
        """
        if self.format.is_integer:
            return min(self.middle - self.qmin, self.qmax - self.middle)
        if self.format.scale_rule == "floor":
            return float(2.0 ** math.floor(math.log2(self.qmax)))
        return self.qmax


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
        low, high = np.asarray(lo, dtype=np.float32), np.asarray(hi, dtype=np.float32)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError("a range must be finite")
        low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
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
        zero_point: [scale_shape] of the spec's `zero_dtype`, None when it is 0 everywhere on a signed format.
        spec: The spec that they belong to.
        scale_codes: The scale as it is stored, when the format has scales of 8 or 16 bits: ``dequantize`` of it is
            `scale`, bit for bit. None when the scale is stored as float32.
    """

    scale: F32
    zero_point: Array | None
    spec: Spec
    scale_codes: QArray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QArray:
    """Codes ``q [shape]`` and what they mean."""

    q: Array
    params: QParams


def params_from_range(rng: Range, spec: Spec) -> QParams:
    """Turn real intervals into scales and zero points.

    A range of zero width (an all-zero tensor) gets scale 1: zero stays exactly zero. A format without scales (a cast)
    gets scale 1 too. Under the scale rule "floor" the magnitudes of a block that exceed ``qmax`` times its power of
    two saturate, as the specification has it; ``replace(format, scale_rule="up")`` takes the next power of two.

    Args:
        rng: ``lo``, ``hi`` [scale_shape].
        spec: Format and symmetry.

    Returns:
        Parameters with ``scale`` [scale_shape] and a zero point such that real 0 has a code of its own, or that is a
        real number.

    Source: for blocks with power-of-two scales, OCP Microscaling Formats 1.0, section 6.3.
    """
    lo, hi = (np.clip(bound.astype(np.float64), -LARGEST_BOUND, LARGEST_BOUND) for bound in (rng.lo, rng.hi))
    if not spec.format.scale_levels:
        return QParams(scale=np.ones(lo.shape, np.float32), zero_point=None, spec=spec)
    if spec.symmetric or not spec.format.is_integer:
        params = params_from_scale(np.maximum(-lo, hi) / spec.span, spec)
        if spec.middle == 0:
            return params
        return replace(params, zero_point=np.full(lo.shape, spec.middle, spec.format.dtype))
    params = params_from_scale((hi - lo) / (spec.qmax - spec.qmin), spec)
    zero = spec.qmin - lo / params.scale.astype(np.float64)
    zero = np.clip(zero if spec.float_zero else np.rint(zero), spec.qmin, spec.qmax)
    return replace(params, zero_point=np.asarray(zero).astype(spec.zero_dtype))


def params_from_scale(scale: npt.ArrayLike, spec: Spec, zero_point: Array | None = None) -> QParams:
    """Bring ideal scales to what the format can store.

    Args:
        scale: [scale_shape], >= 0, finite; 0 stands for "nothing but zeros here".
        spec: Its format says how scales are stored and rounded.
        zero_point: [scale_shape] or None, taken over.

    Returns:
        Parameters whose `scale` is exactly what the stored scales mean.
    """
    ideal = np.asarray(scale, dtype=np.float64)
    if spec.format.scale_format == "float32":
        return QParams(scale=_normal(ideal), zero_point=zero_point, spec=spec)
    stored = FORMATS.get(spec.format.scale_format)
    outer = np.ones((), np.float32)
    if spec.format.scale_levels == 2:
        largest = _normal(np.asarray(ideal.max(initial=0.0) / stored.qmax))
        outer = np.maximum(largest, SMALLEST_SCALE / np.float32(_smallest(stored)))
    inner = np.where(ideal == 0, 1.0, ideal / outer.astype(np.float64))
    inner = np.clip(inner, max(_smallest(stored), float(SMALLEST_SCALE) / float(outer)), stored.qmax)
    outer_params = QParams(scale=np.asarray(outer), zero_point=None, spec=Spec(format=stored))
    codes = QArray(q=_round_scale(inner, stored, spec.format.scale_rule), params=outer_params)
    return QParams(scale=dequantize(codes), zero_point=zero_point, spec=spec, scale_codes=codes)


def _smallest(stored: Format) -> float:
    """Smallest value that a scale may take: subnormals of 8 bits are ordinary codes, others may be flushed."""
    info = stored.float_info
    return float(info.smallest_subnormal if stored.bits == 8 else info.smallest_normal)


def _round_scale(scale: F64, stored: Format, rule: str) -> Array:
    codes = np.asarray(scale.astype(stored.dtype))
    if rule == "nearest":
        return codes
    # The bits of positive floats count upwards with their values, so that the next value is the next integer.
    values, bits = codes.astype(np.float64), codes.view(f"u{codes.itemsize}")
    step = (values < scale).astype(np.int64) if rule == "up" else -(values > scale).astype(np.int64)
    return np.asarray((bits + step).astype(bits.dtype)).view(stored.dtype)


def _normal(scale: F64) -> F32:
    clipped = np.clip(scale, float(SMALLEST_SCALE), float(np.finfo(np.float32).max))
    return np.asarray(np.where(scale == 0, 1.0, clipped), dtype=np.float32)


def minmax_range(x: Array, granularity: Granularity) -> Range:
    """Return the smallest and largest value per scale of ``x [shape]``, as a `Range` [scale_shape]."""
    if x.size == 0:
        zeros = np.zeros(granularity.scale_shape(x.shape), dtype=np.float32)
        return Range(lo=zeros, hi=zeros)
    return Range.of(granularity.reduce(x, np.minimum), granularity.reduce(x, np.maximum))


def quantize(x: Array, params: QParams) -> QArray:
    """Quantize ``x [shape]`` as ONNX QuantizeLinear does: divide, round half to even, add, saturate.

    A zero point that is a real number is added before rounding.

    A cast format is cast to without saturating, as Cast does; a codebook format takes the nearest value of its book
    (the lower one when two are equally near).
    """
    spec = params.spec
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.asarray(np.asarray(x, dtype=np.float32) / spec.granularity.spread(params.scale, np.shape(x)))
        if spec.format.codebook:
            return QArray(q=_nearest(scaled, spec.format), params=params)
        if not spec.format.is_integer:
            inside = np.clip(scaled, spec.qmin, spec.qmax) if spec.format.scale_levels else scaled
            return QArray(q=np.asarray(inside).astype(spec.format.dtype), params=params)
    if params.zero_point is None:
        codes = np.rint(scaled, out=scaled)
    else:
        zero = spec.granularity.spread(params.zero_point.astype(np.float32), scaled.shape)
        codes = np.rint(scaled + zero if spec.float_zero else scaled, out=scaled)
        if not spec.float_zero:
            codes += zero
    np.fmax(codes, np.float32(spec.qmin), out=codes)  # fmax, not maximum: NaN becomes the lowest code
    np.minimum(codes, np.float32(spec.qmax), out=codes)
    return QArray(q=_cast(codes, spec.format), params=params)


def _cast(codes: F32, fmt: Format) -> Array:
    """Cast whole numbers within the range of a format to its codes; by way of bytes, which is several times as fast."""
    if fmt.bits < 8 and fmt.dtype != np.float32:
        codes = codes.astype(np.int8 if fmt.is_signed else np.uint8)
    return codes.astype(fmt.dtype, copy=False)


def _nearest(scaled: F32, book: Format) -> Array:
    values, codes = np.unique(np.asarray(book.codebook), return_index=True)
    middles = (values[1:] + values[:-1]) / 2
    return np.asarray(codes[np.searchsorted(middles, scaled)]).astype(book.dtype)


def dequantize(qarray: QArray) -> F32:
    """Return ``scale * (q - zero_point)`` [shape] in float32."""
    params = qarray.params
    granularity = params.spec.granularity
    codes = _decode(qarray.q, params.spec.format)
    if params.zero_point is not None:
        codes = codes - granularity.spread(params.zero_point.astype(np.float32), codes.shape)
    return np.asarray(codes * granularity.spread(params.scale, codes.shape), dtype=np.float32)


def _decode(q: Array, fmt: Format) -> F32:
    """What codes mean before the scale; small floats are looked up, which is faster than casting them."""
    if fmt.is_integer or fmt.bits > 8:
        return q.astype(np.float32, copy=False)
    return np.asarray(_values(fmt).take(q.view(np.uint8) & np.uint8(2**fmt.bits - 1)))


@functools.cache
def _values(fmt: Format) -> F32:
    """Value of each code of a float or codebook format of at most 8 bits."""
    if fmt.codebook:
        return np.asarray(fmt.codebook, dtype=np.float32)
    return np.arange(2**fmt.bits, dtype=np.uint8).view(fmt.dtype).astype(np.float32)


def fake_quant(x: Array, params: QParams) -> F32:
    """Quantize and dequantize ``x [shape]``: the values that the quantized model computes with."""
    return dequantize(quantize(x, params))
