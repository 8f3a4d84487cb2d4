"""Properties of quantization parameters and of the round trip, for any data."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import PER_TENSOR, Granularity, per_block
from qpipe.calibrate.qarray import (
    QArray,
    Range,
    Spec,
    dequantize,
    fake_quant,
    minmax_range,
    params_from_range,
    params_from_scale,
    quantize,
)

INTEGERS = [name for name, fmt in FORMATS.items() if fmt.is_integer]
FLOATS = [name for name, fmt in FORMATS.items() if fmt.kind == "float" and fmt.lowering == "qdq" and not fmt.block_size]
BLOCKS = [name for name, fmt in FORMATS.items() if fmt.block_size]
CODEBOOKS = [name for name, fmt in FORMATS.items() if fmt.codebook]
SMALLEST_NORMAL = np.float32(2.0**-126)

any_finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
moderate = st.floats(min_value=-(2.0**126), max_value=2.0**126, width=32)
ordinary = st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32)


@st.composite
def integer_specs(draw):
    fmt = FORMATS.get(draw(st.sampled_from(INTEGERS)))
    return Spec(
        format=fmt,
        symmetric=draw(st.booleans()),
        narrow_range=draw(st.booleans()) and fmt.bits > 2,
        reduce_bits=draw(st.integers(0, 1)) if fmt.bits > 3 else 0,
    )


@st.composite
def any_specs(draw):
    if draw(st.booleans()):
        return draw(integer_specs())
    fmt = FORMATS.get(draw(st.sampled_from(FLOATS + BLOCKS + CODEBOOKS)))
    return Spec(format=fmt, granularity=per_block(0, fmt.block_size) if fmt.block_size else PER_TENSOR)


def ranges(bounds):
    return st.tuples(bounds, bounds).map(lambda pair: (min(*pair, 0.0), max(*pair, 0.0)))


def params_of(interval, spec):
    shape = spec.granularity.scale_shape((1,))
    return params_from_range(Range.of(np.full(shape, interval[0]), np.full(shape, interval[1])), spec)


@settings(deadline=None)
@given(interval=ranges(any_finite), spec=any_specs())
def test_scale_is_finite_and_normal_for_any_finite_range(interval, spec):
    params = params_of(interval, spec)
    assert params.scale.dtype == np.float32
    assert np.isfinite(params.scale).all()
    assert (params.scale >= SMALLEST_NORMAL).all()
    if interval == (0, 0):
        assert (params.scale == 1).all()


@settings(deadline=None)
@given(interval=ranges(any_finite), spec=any_specs())
def test_zero_is_exactly_representable(interval, spec):
    params = params_of(interval, spec)
    assert fake_quant(np.zeros(1, np.float32), params)[0] == 0
    if params.zero_point is not None:
        assert spec.qmin <= int(params.zero_point.ravel()[0]) <= spec.qmax


@settings(deadline=None)
@given(interval=ranges(moderate), spec=integer_specs(), where=hnp.arrays(np.float64, 32, elements=st.floats(0, 1)))
def test_error_is_at_most_half_a_step_inside_the_range(interval, spec, where):
    params = params_of(interval, spec)
    lo, hi = interval
    x = np.clip((lo + where * (hi - lo)).astype(np.float32), np.float32(lo), np.float32(hi))
    error = np.abs(fake_quant(x, params).astype(np.float64) - x)
    # The last term is what float32 itself loses in the division and in the product.
    assert (error <= params.scale.astype(np.float64) * (0.5 + 2.0 ** (spec.format.bits - 22))).all()


@settings(deadline=None)
@given(interval=ranges(moderate), spec=integer_specs(), beyond=st.floats(1, 1e30))
def test_values_outside_saturate(interval, spec, beyond):
    params = params_of(interval, spec)
    zero = 0 if params.zero_point is None else int(params.zero_point)
    scale = float(params.scale)
    top, bottom = (spec.qmax - zero) * scale, (spec.qmin - zero) * scale
    far = np.clip(np.array([top + beyond * scale, bottom - beyond * scale]), -3.4e38, 3.4e38)
    if far[0] < top or far[1] > bottom:
        return  # the ends of the codes lie beyond float32 itself
    assert quantize(far.astype(np.float32), params).q.astype(int).tolist() == [spec.qmax, spec.qmin]


@settings(deadline=None)
@given(spec=any_specs(), x=hnp.arrays(np.float32, 48, elements=ordinary))
def test_quantization_keeps_the_order(spec, x):
    params = params_of((-1e3, 2e3), spec)
    x = np.sort(x)
    if spec.granularity.block_size:
        params = params_from_scale(np.full(spec.granularity.scale_shape(x.shape), 7.0), spec)
    assert (np.diff(fake_quant(x, params)) >= 0).all()


@settings(deadline=None)
@given(spec=any_specs(), x=hnp.arrays(np.float32, 48, elements=ordinary))
def test_quantizing_again_changes_nothing(spec, x):
    params = params_of((-1e3, 2e3), spec)
    if spec.granularity.block_size:
        params = params_from_scale(np.full(spec.granularity.scale_shape(x.shape), 7.0), spec)
    once = fake_quant(x, params)
    assert np.array_equal(fake_quant(once, params), once)


@settings(deadline=None)
@given(
    name=st.sampled_from(FLOATS),
    amax=st.floats(1e-30, 1e38),
    where=hnp.arrays(np.float64, 32, elements=st.floats(-1, 1)),
)
def test_float_error_is_half_a_unit_in_the_last_place(name, amax, where):
    fmt = FORMATS.get(name)
    params = params_of((-amax, amax), Spec(format=fmt))
    x = (where * float(np.float32(amax))).astype(np.float32)
    error = np.abs(fake_quant(x, params).astype(np.float64) - x)
    relative = np.abs(x.astype(np.float64)) * 2.0 ** -(fmt.float_info.nmant + 1)
    absolute = float(fmt.float_info.smallest_subnormal) * params.scale.astype(np.float64) / 2
    assert (error <= np.maximum(relative, absolute) * (1 + 2.0**-18)).all()


@settings(deadline=None)
@given(name=st.sampled_from(CODEBOOKS), x=hnp.arrays(np.float32, 24, elements=st.floats(-4, 4, width=32)))
def test_codebook_takes_the_nearest_value(name, x):
    fmt = FORMATS.get(name)
    params = params_of((-2, 2), Spec(format=fmt))
    book = np.asarray(fmt.codebook) * 2
    best = np.abs(x[:, None].astype(np.float64) - book).min(axis=1)
    assert np.allclose(np.abs(fake_quant(x, params) - x.astype(np.float64)), best, rtol=0, atol=1e-6)


arrays_2d = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=ordinary)


@settings(deadline=None)
@given(
    name=st.sampled_from(BLOCKS), rule=st.sampled_from(["nearest", "up", "floor"]), x=arrays_2d, axis=st.integers(0, 1)
)
def test_stored_scales_mean_exactly_the_scale(name, rule, x, axis):
    fmt = replace(FORMATS.get(name), scale_rule=rule)
    spec = Spec(format=fmt, granularity=per_block(axis, fmt.block_size))
    params = params_from_range(minmax_range(x, spec.granularity), spec)
    assert params.scale_codes.q.dtype == FORMATS.get(fmt.scale_format).dtype
    assert params.scale.shape == params.scale_codes.q.shape == spec.granularity.scale_shape(x.shape)
    assert np.array_equal(dequantize(params.scale_codes), params.scale)
    assert (params.scale >= SMALLEST_NORMAL).all()


@settings(deadline=None)
@given(
    x=hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=11), elements=ordinary), data=st.data()
)
def test_every_block_is_quantized_as_if_it_were_alone(x, data):
    """Per channel and per block equal the per-tensor result of each slice, bit for bit."""
    axis = data.draw(st.integers(-2, 1))
    granularity = Granularity(axis=axis, block_size=data.draw(st.integers(0, 9)))
    name = data.draw(st.sampled_from(["int8", "uint4", "float8_e4m3fn", "nf4"]))
    spec = Spec(format=FORMATS.get(name), granularity=granularity, symmetric=name != "uint4")
    params = params_from_range(minmax_range(x, granularity), spec)
    whole = quantize(x, params).q
    alone = replace(spec, granularity=PER_TENSOR)
    for index in np.ndindex(*params.scale.shape):
        region = region_of(index, x.shape, granularity)
        part = params_from_range(minmax_range(x[region], PER_TENSOR), alone)
        assert part.scale == params.scale[index]
        assert np.array_equal(quantize(x[region], part).q, whole[region])


def region_of(index, shape, granularity):
    """The part of an array of 2 dimensions that shares the scale at ``index``."""
    axis = granularity.axis % 2
    region = [slice(None)] * 2
    if granularity.block_size:
        region = [slice(i, i + 1) for i in index]
        start = index[axis] * granularity.block_size
        region[axis] = slice(start, min(start + granularity.block_size, shape[axis]))
    else:
        region[axis] = slice(index[axis], index[axis] + 1)
    return tuple(region)


@pytest.mark.parametrize("amax", [1e-45, 1e-40, 2.0**-126, 1e-30, 1.0, 1e38, float(np.finfo(np.float32).max)])
@pytest.mark.parametrize("name", ["int8", "uint8", "int16", "int4", "float8_e4m3fn", "float4_e2m1", "nf4"])
def test_extreme_tensors_survive(name, amax):
    """Subnormal ranges keep a normal scale; ranges near the largest float overflow nowhere."""
    x = np.array([amax, -amax / 2, 0], np.float32)
    spec = Spec(format=FORMATS.get(name))
    params = params_from_range(minmax_range(x, PER_TENSOR), spec)
    back = fake_quant(x, params)
    assert np.isfinite(back).all()
    bound = min(amax, 2.0**127)
    assert np.abs(back - np.clip(x, -bound, bound)).max() <= max(bound * 0.26, SMALLEST_NORMAL)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_range_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        Range.of(0.0, bad)


def test_a_constant_one_sided_tensor_uses_all_codes():
    """A range is widened to contain zero, so that a constant is the largest code, not a division by zero."""
    x = np.full(10, 3.25, np.float32)
    params = params_from_range(minmax_range(x, PER_TENSOR), Spec(format=FORMATS.get("uint8"), symmetric=False))
    assert quantize(x, params).q.tolist() == [255] * 10
    assert int(params.zero_point) == 0
    assert np.allclose(fake_quant(x, params), x, rtol=1e-6)


def test_qarray_dequantizes_what_it_holds():
    params = params_from_scale(np.float32(0.25), Spec(format=FORMATS.get("int8")))
    assert dequantize(QArray(q=np.array([-4, 0, 127], np.int8), params=params)).tolist() == [-1, 0, 31.75]
