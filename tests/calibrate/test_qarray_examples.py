"""The worked examples that define the arithmetic, as exact numbers."""

import dataclasses

import numpy as np
import pytest
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import PER_TENSOR, per_channel
from qpipe.calibrate.qarray import (
    QParams,
    Range,
    Spec,
    dequantize,
    fake_quant,
    minmax_range,
    params_from_range,
    params_from_scale,
    quantize,
)

X = np.array([1.21, -1.13, 0.22, 0.83, 2.11, -1.53, 0.79, -0.54, 0.84], np.float32)
W = np.array([0.1, 0.2, 1.2, 3, 2.1, -2.1, -3.5], np.float32)


def spec(name, **options):
    return Spec(format=FORMATS.get(name), **options)


def test_symmetric_int8():
    params = params_from_range(minmax_range(X, PER_TENSOR), spec("int8", narrow_range=True))
    assert params.scale == np.float32(2.11 / 127)
    assert params.zero_point is None
    assert quantize(X, params).q.tolist() == [73, -68, 13, 50, 127, -92, 48, -33, 51]


def test_rounding_down_gives_other_codes():
    """A widespread text works this example by rounding towards zero or down; ONNX rounds half to even."""
    params = params_from_range(minmax_range(X, PER_TENSOR), spec("int8", narrow_range=True))
    codes = quantize(X, params).q
    assert np.floor(X / params.scale).tolist() == [72, -69, 13, 49, 127, -93, 47, -33, 50]
    assert np.trunc(X / params.scale).tolist() == [72, -68, 13, 49, 127, -92, 47, -32, 50]
    assert np.rint(X / params.scale).tolist() == codes.tolist()


def test_asymmetric_uint8():
    params = params_from_range(minmax_range(X, PER_TENSOR), spec("uint8", symmetric=False))
    assert params.scale == np.float32((2.11 + 1.53) / 255)
    assert params.zero_point == 107
    qarray = quantize(X, params)
    assert qarray.q.min() == 0
    assert qarray.q.max() == 255
    assert np.abs(dequantize(qarray) - X).max() <= params.scale / 2


def test_symmetric_int4():
    params = params_from_range(minmax_range(W, PER_TENSOR), spec("int4", narrow_range=True))
    assert params.scale == np.float32(0.5)
    assert quantize(W, params).q.astype(int).tolist() == [0, 0, 2, 6, 4, -4, -7]


def test_a_real_zero_point_is_added_before_rounding():
    spec = Spec(format=FORMATS.get("uint4"), symmetric=False, float_zero=True)
    params = params_from_range(Range.of(-1.0, 5.0), spec)
    assert params.zero_point.dtype == np.float32
    assert (params.scale, params.zero_point) == (np.float32(0.4), np.float32(2.5))
    qarray = quantize(np.float32([-1.0, -0.8, 0.0, 0.4, 5.0, 9.0]), params)
    assert qarray.q.tolist() == [0, 0, 2, 4, 15, 15]  # -0.8 is -2 steps, 0.5 with the zero point: half to even
    np.testing.assert_allclose(dequantize(qarray), [-1.0, -1.0, -0.2, 0.6, 5.0, 5.0], atol=1e-6)
    for wrong in ({"symmetric": True}, {"format": FORMATS.get("float8_e4m3fn")}):
        with pytest.raises(ValueError, match="zero points that can be real"):
            dataclasses.replace(spec, **wrong)


def test_asymmetric_uint4():
    params = params_from_range(minmax_range(W, PER_TENSOR), spec("uint4", symmetric=False))
    assert params.scale == np.float32(6.5 / 15)
    assert int(params.zero_point) == 8
    assert quantize(W, params).q.astype(int).tolist() == [8, 8, 11, 15, 13, 3, 0]


def test_half_goes_to_the_even_code():
    params = params_from_scale(np.float32(1), spec("int8"))
    ties = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], np.float32)
    assert quantize(ties, params).q.tolist() == [-2, -2, 0, 0, 2, 2]


@pytest.mark.parametrize("zero_point", [1, 2, -3, 50])
def test_zero_point_is_added_after_rounding(zero_point):
    """With an odd zero point, rounding after adding would send ties to the other side."""
    params = QParams(scale=np.float32(2), zero_point=np.array(zero_point, np.int8), spec=spec("int8"))
    ties = np.array([-5, -3, -1, 1, 3, 5], np.float32)
    expected = np.clip(np.array([-2, -2, 0, 0, 2, 2]) + zero_point, -128, 127)
    assert quantize(ties, params).q.tolist() == expected.tolist()
    after = np.clip(np.rint(ties / 2 + zero_point), -128, 127)
    assert (after.tolist() == expected.tolist()) == (zero_point % 2 == 0)


def test_symmetric_unsigned_has_its_zero_in_the_middle():
    params = params_from_range(Range.of(-1.0, 1.0), spec("uint8"))
    assert params.zero_point == 128
    assert quantize(np.array([-1, 0, 1], np.float32), params).q.tolist() == [1, 128, 255]


def test_seven_bit_weights_stay_within_64():
    params = params_from_range(Range.of(-1.0, 1.0), spec("int8", reduce_bits=1))
    assert quantize(np.array([-9, -1, 0, 1, 9], np.float32), params).q.tolist() == [-64, -63, 0, 63, 63]


def test_each_channel_has_its_scale():
    x = np.array([[1, -2], [100, 50]], np.float32)
    params = params_from_range(minmax_range(x, per_channel(0)), spec("int8", granularity=per_channel(0)))
    assert params.scale.tolist() == [[np.float32(2 / 127)], [np.float32(100 / 127)]]
    assert quantize(x, params).q.tolist() == [[64, -127], [127, 64]]


def test_all_zero_tensor_has_scale_one_and_stays_zero():
    x = np.zeros((2, 3), np.float32)
    params = params_from_range(minmax_range(x, per_channel(0)), spec("int8", granularity=per_channel(0)))
    assert params.scale.tolist() == [[1], [1]]
    assert not fake_quant(x, params).any()


def test_an_empty_array_is_quantized_to_an_empty_array():
    x = np.zeros((0, 4), np.float32)
    params = params_from_range(minmax_range(x, PER_TENSOR), spec("int8"))
    assert quantize(x, params).q.shape == (0, 4)


def test_a_scalar_stays_a_scalar():
    params = params_from_scale(np.float32(0.5), spec("int8"))
    assert quantize(np.float32(3), params).q.shape == ()
    assert dequantize(quantize(np.float32(3), params)) == 3


def test_the_input_is_not_written_to():
    x = X.copy()
    quantize(x, params_from_scale(np.float32(1), spec("int8")))
    assert np.array_equal(x, X)


def test_fewer_than_two_bits_are_refused():
    with pytest.raises(ValueError, match="fewer than 2"):
        spec("int2", reduce_bits=1)
