"""Rules about the values of scales."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import numpy.typing as npt

from . import rule
from .context import Array, Context, Problem, Site, constant_of


@rule("scale-present", "error", do="give the node a scale")
def scale_present(context: Context) -> Iterator[Problem]:
    """Every Q/DQ node has a tensor and a scale.

    Source: ONNX QuantizeLinear and DequantizeLinear, inputs.
    """
    for site in context.sites:
        if site.scale is None:
            name = site.x if site.node.inputs else site.y
            yield site.problem(f"{len(site.node.inputs)} inputs", "a tensor and a scale", name)


@rule("scale-finite", "error", do="calibrate again without the batches that hold NaN or Inf")
def scale_finite(context: Context) -> Iterator[Problem]:
    """Scales are finite: an infinite scale makes every value 0, a NaN makes every value NaN.

    Such a scale comes from a calibration batch that held Inf or NaN.
    """
    for site, scales in _constant_scales(context):
        bad = ~np.isfinite(scales)
        if bad.any():
            yield site.problem(_count(scales, bad), "finite scales", site.scale)


@rule("scale-positive", "error", do="use scale 1 for a tensor that is all zero")
def scale_positive(context: Context) -> Iterator[Problem]:
    """Scales are above zero: zero divides by zero, a negative one turns the sign of every value.

    Blocks of stored weights are let through unless the target refuses them: nothing divides by their scales, and
    ONNX Runtime's 4-bit quantizer writes 0 for blocks of zeros and negative scales to use the code -8.
    Source: ONNX QuantizeLinear, ``y = saturate((x / y_scale) + y_zero_point)``.
    """
    strict = context.target is not None and context.target.positive_blocks
    for site, scales in _constant_scales(context):
        stored_blocks = site.block_size and not site.is_quantize and constant_of(site.x) is not None
        bad = ~_above_zero(scales) & np.isfinite(scales)
        if bad.any() and (strict or not stored_blocks):
            yield site.problem(_count(scales, bad), "scales above 0", site.scale)


@rule("scale-normal", "error", do="use at least 2^-126, the smallest normal float32")
def scale_normal(context: Context) -> Iterator[Problem]:
    """float32 and bfloat16 scales are not subnormal: hardware that flushes subnormals to zero divides by zero."""
    for site, scales in _constant_scales(context):
        bad = _subnormal(scales)
        if scales.dtype != np.float16 and bad.any():
            yield site.problem(_count(scales, bad), "normal numbers", site.scale)


@rule("scale-precision", "warning", do="keep the scales in float32")
def scale_precision(context: Context) -> Iterator[Problem]:
    """float16 scales are not subnormal: below 6.1e-5 a float16 loses its digits one by one."""
    for site, scales in _constant_scales(context):
        bad = _subnormal(scales)
        if scales.dtype == np.float16 and bad.any():
            yield site.problem(_count(scales, bad), "scales of 6.1e-05 or more", site.scale)


def _constant_scales(context: Context) -> Iterator[tuple[Site, Array]]:
    for site in context.sites:
        if site.scales is not None and site.scales.dtype.kind != "i":
            yield site, site.scales


def _above_zero(scales: Array) -> npt.NDArray[np.bool_]:
    # In float32, because some types of scales have no 0 to compare with.
    return np.asarray(scales.astype(np.float32) > 0)


def _subnormal(scales: Array) -> npt.NDArray[np.bool_]:
    smallest = ml_dtypes.finfo(scales.dtype).smallest_normal
    with np.errstate(invalid="ignore"):
        return np.asarray(_above_zero(scales) & (scales < smallest))


def _count(scales: Array, bad: npt.NDArray[np.bool_]) -> str:
    flat = np.flatnonzero(bad)
    first = f"{float(scales.reshape(-1)[flat[0]]):g}"
    return (
        f"scale {first}" if scales.size == 1 else f"{flat.size} of {scales.size} scales, the first {first} at {flat[0]}"
    )
