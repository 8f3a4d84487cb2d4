"""Bit equality of quantize and dequantize with `onnx.reference` and with ONNX Runtime, optimizations off.

A million values per type: uniform over twice the range, exact ties, random bit patterns (every exponent, subnormals),
signed zeros. Where the two disagree or both depart from the operator's text, `quantize` follows the text:

- |x / scale| >= 2^31: the reference casts to int32 before it saturates, so that large values get the *lowest* code;
  ONNX Runtime does the same for int2 and uint2 only. Here, as in ONNX Runtime otherwise, they saturate upwards.
- NaN: the lowest code of an integer format (as in ONNX Runtime), NaN in a float format that has one.
"""

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import PER_TENSOR, per_block, per_channel
from qpipe.calibrate.qarray import QArray, QParams, Spec, dequantize, quantize

COUNT = 1_000_000
SHAPE = (50, COUNT // 50)
INTEGERS = ["int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16"]
FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
SMALL_FLOATS = ["float4_e2m1", "float6_e2m3", "float6_e3m2"]
GRANULARITIES = {"tensor": PER_TENSOR, "channel": per_channel(0), "block": per_block(1, 16)}


def bits_equal(a, b):
    """Equal bit for bit, any NaN equal to any other."""
    return bool(np.all((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))))


def model_of(spec, scale, zero_point, inputs_are_codes=False):
    """Q -> DQ; the outputs are the codes (dequantized by scale 1) and the values."""
    fmt, granularity = spec.format, spec.granularity
    flat = (lambda a: a.ravel()) if granularity.axis is not None and not granularity.block_size else (lambda a: a)
    where = {} if granularity.axis is None else {"axis": granularity.axis}
    blocks = {"block_size": granularity.block_size} if granularity.block_size else {}
    opset = max(fmt.min_opset, 21 if blocks else 19)
    zero = fmt.zeros(scale.shape) if zero_point is None and opset == 19 else zero_point
    params = ["scale"] if zero is None else ["scale", "zero"]
    output = {"output_dtype": getattr(TensorProto, fmt.onnx_type)} if zero is None else {}
    arrays = {"scale": flat(scale), "zero": None if zero is None else flat(zero), "one": np.float32(1)}
    initializers = [numpy_helper.from_array(a, name) for name, a in arrays.items() if a is not None]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *params], ["q"], **where, **blocks, **output),
        helper.make_node("DequantizeLinear", ["q", "one"], ["codes"]),
        helper.make_node("DequantizeLinear", ["q", *params], ["y"], **where, **blocks),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("codes", "y")]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None])
    graph = helper.make_graph(nodes, "g", [x], outputs, initializers)
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=helper.find_min_ir_version_for(imports))


def run_reference(model, x):
    with np.errstate(all="ignore"):
        return [np.asarray(y, np.float32) for y in ReferenceEvaluator(model).run(None, {"x": x})]


def run_ort(model, x):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def ours(x, params):
    qarray = quantize(x, params)
    return qarray.q.astype(np.float32), dequantize(qarray)


def draw_params(name, granularity, rng, power_of_two):
    """Scales over four decades and zero points over all codes."""
    spec = Spec(format=FORMATS.get(name), granularity=granularity)
    shape = granularity.scale_shape(SHAPE)
    scale = np.exp(rng.uniform(-5, 4, shape)).astype(np.float32)
    if power_of_two:
        scale = np.exp2(np.rint(np.log2(scale))).astype(np.float32)
    zero = None
    if spec.format.is_integer:
        codes = rng.integers(spec.format.qmin, spec.format.qmax + 1, shape)
        zero = np.asarray(codes).astype(spec.format.dtype)
    return QParams(scale=np.asarray(scale), zero_point=zero, spec=spec)


def draw_values(params, rng):
    """Half uniform over twice the range, a quarter exact ties, a quarter random finite bits; signed zeros."""
    spec = params.spec
    scale = spec.granularity.spread(params.scale, SHAPE)
    reach = spec.format.qmax - spec.format.qmin
    x = (rng.uniform(-reach, reach, SHAPE) * scale).astype(np.float32)
    if spec.format.is_integer:
        ties = (rng.integers(-reach, reach, SHAPE) + 0.5) * scale
    else:
        # Half-way between neighbours: the mean of two values whose codes follow each other.
        some = rng.uniform(-spec.qmax, spec.qmax, SHAPE).astype(spec.format.dtype).astype(np.float32)
        near = (some * np.float32(1 + 2.0 ** -(spec.format.float_info.nmant + 1))).astype(np.float32)
        ties = near * scale
    raw = rng.integers(0, 2**32, SHAPE, dtype=np.uint32).view(np.float32)
    raw = np.where(np.isfinite(raw), raw, np.float32(0))
    kind = rng.integers(0, 4, SHAPE)
    with np.errstate(all="ignore"):
        x = np.where(kind == 2, ties.astype(np.float32), np.where(kind == 3, raw, x))
        x = np.where(np.abs(x / scale) < 2.0**30, x, 0).astype(np.float32)
    x[:, :4] = np.array([0.0, -0.0, 1e-45, -1e-45], np.float32)
    return x


@pytest.mark.parametrize(
    ("granularity", "power_of_two"),
    [(name, True) for name in GRANULARITIES] + [("tensor", False)],
    ids=[*GRANULARITIES, "tensor, any scale"],
)
@pytest.mark.parametrize("name", INTEGERS + FLOAT8)
def test_equal_to_reference_and_onnxruntime(name, granularity, power_of_two):
    rng = np.random.default_rng(INTEGERS.index(name) if name in INTEGERS else 100 + FLOAT8.index(name))
    params = draw_params(name, GRANULARITIES[granularity], rng, power_of_two)
    x = draw_values(params, rng)
    codes, values = ours(x, params)
    model = model_of(params.spec, params.scale, params.zero_point)
    for run in (run_reference, run_ort):
        their_codes, their_values = run(model, x)
        assert bits_equal(codes, their_codes)
        assert bits_equal(values, their_values)
    if power_of_two and name in INTEGERS:
        scaled = x / params.spec.granularity.spread(params.scale, SHAPE)
        assert np.count_nonzero(scaled % 1 == 0.5) > COUNT // 8


@pytest.mark.parametrize("name", SMALL_FLOATS)
def test_small_floats_are_equal_to_the_reference(name):
    """ONNX Runtime's CPU provider has no kernels for them.

    Without a zero point: the reference adds it even where it is zero, which turns minus zero into zero.
    """
    rng = np.random.default_rng(5)
    params = draw_params(name, PER_TENSOR, rng, True)
    x = draw_values(params, rng)
    codes, values = ours(x, params)
    their_codes, their_values = run_reference(model_of(params.spec, params.scale, None), x)
    assert bits_equal(codes, their_codes)
    assert bits_equal(values, their_values)


def sweep_of_floats():
    """Every sign, exponent and upper mantissa (65,536 of them) with 16 endings, infinities and NaN among them."""
    rng = np.random.default_rng(7)
    upper = np.repeat(np.arange(65536, dtype=np.uint32) << 16, 16)
    lower = rng.integers(0, 65536, upper.size, dtype=np.uint32)
    lower[0::16], lower[1::16], lower[2::16], lower[3::16] = 0, 1, 0x8000, 0xFFFF
    return (upper | lower).view(np.float32).reshape(16, -1)


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_is_equal_over_all_floats_and_non_finite_values(name):
    spec = Spec(format=FORMATS.get(name))
    params = QParams(scale=np.ones((), np.float32), zero_point=None, spec=spec)
    x = sweep_of_floats()
    codes, _ = ours(x, params)
    model = model_of(spec, params.scale, None)
    assert np.isnan(x).any()
    assert np.isinf(x).any()
    assert np.array_equal(np.isnan(codes), np.isnan(x))
    assert bits_equal(codes, run_reference(model, x)[0])
    assert bits_equal(codes, run_ort(model, x)[0])


@pytest.mark.parametrize("name", ["int4", "uint4", "int8", "uint8", "int16", "uint16"])
def test_integers_are_equal_to_onnxruntime_over_all_floats(name):
    spec = Spec(format=FORMATS.get(name))
    params = QParams(scale=np.ones((), np.float32), zero_point=None, spec=spec)
    x = sweep_of_floats()
    codes, _ = ours(x, params)
    assert bits_equal(codes, run_ort(model_of(spec, params.scale, None), x)[0])


@pytest.mark.parametrize("zero_point", [-3, 0, 3])
@pytest.mark.parametrize("name", INTEGERS)
def test_what_is_too_large_saturates_and_nan_is_the_lowest_code(name, zero_point):
    fmt = FORMATS.get(name)
    zero = fmt.dtype(np.clip(zero_point, fmt.qmin, fmt.qmax))
    params = QParams(scale=np.float32(2.0**-100), zero_point=np.asarray(zero), spec=Spec(format=fmt))
    x = np.array([np.inf, 3e38, 3e9, -3e9, -3e38, -np.inf, np.nan], np.float32)
    expected = [fmt.qmax] * 3 + [fmt.qmin] * 4
    assert quantize(x, params).q.astype(int).tolist() == expected


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1", "float6_e2m3"])
def test_float_formats_saturate_to_the_largest_finite_value(name):
    fmt = FORMATS.get(name)
    params = QParams(scale=np.float32(1), zero_point=None, spec=Spec(format=fmt))
    x = np.array([np.inf, 3e38, -3e38, -np.inf], np.float32)
    assert quantize(x, params).q.astype(np.float64).tolist() == [fmt.qmax, fmt.qmax, fmt.qmin, fmt.qmin]


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_casts_are_equal_to_cast(name):
    fmt = FORMATS.get(name)
    params = QParams(scale=np.ones((), np.float32), zero_point=None, spec=Spec(format=fmt))
    x = sweep_of_floats()
    nodes = [
        helper.make_node("Cast", ["x"], ["q"], to=getattr(TensorProto, fmt.onnx_type)),
        helper.make_node("Cast", ["q"], ["y"], to=TensorProto.FLOAT),
    ]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, None]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    codes, values = ours(x, params)
    assert bits_equal(codes, values)
    assert bits_equal(codes, run_ort(model, x)[0])
    assert bits_equal(codes, run_reference(model, x)[0])


@pytest.mark.parametrize("name", [*INTEGERS, *FLOAT8])
def test_every_code_dequantizes_as_in_onnxruntime_and_reference(name):
    """All codes, each with 61 scales and zero points, through DequantizeLinear alone."""
    fmt = FORMATS.get(name)
    rng = np.random.default_rng(11)
    raw = np.arange(2**fmt.bits, dtype=np.uint16 if fmt.bits == 16 else np.uint8)
    codes = (raw.astype(fmt.dtype) if fmt.kind == "uint" else raw.view(fmt.dtype))[None].repeat(61, axis=0)
    if fmt.bits < 8 and fmt.kind == "int":
        codes = np.arange(fmt.qmin, fmt.qmax + 1).astype(fmt.dtype)[None].repeat(61, axis=0)
    scale = np.exp(rng.uniform(-80, 60, (61, 1))).astype(np.float32)
    zero = rng.integers(fmt.qmin, fmt.qmax + 1, (61, 1)).astype(fmt.dtype) if fmt.is_integer else None
    params = QParams(scale=scale, zero_point=zero, spec=Spec(format=fmt, granularity=per_channel(0)))
    q = numpy_helper.from_array(codes, "q")
    initializers = [q, numpy_helper.from_array(scale.ravel(), "s")]
    initializers += [] if zero is None else [numpy_helper.from_array(zero.ravel(), "z")]
    node = helper.make_node("DequantizeLinear", [i.name for i in initializers], ["y"], axis=0)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None])
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("y", "same")]
    identity = helper.make_node("Identity", ["x"], ["same"])
    graph = helper.make_graph([node, identity], "g", [x], outputs, initializers)
    imports = [helper.make_opsetid("", max(19, fmt.min_opset))]
    model = helper.make_model(graph, opset_imports=imports, ir_version=helper.find_min_ir_version_for(imports))
    values = dequantize(QArray(q=codes, params=params))
    feed = np.zeros((1, 1), np.float32)
    assert bits_equal(values, run_ort(model, feed)[0])
    assert bits_equal(values, run_reference(model, feed)[0])


def test_half_precision_input_is_widened_first():
    x = np.linspace(-3, 3, 1000)
    params = QParams(scale=np.float32(0.02), zero_point=None, spec=Spec(format=FORMATS.get("int8")))
    for dtype in (np.float16, ml_dtypes.bfloat16):
        narrow = x.astype(dtype)
        assert np.array_equal(quantize(narrow, params).q, quantize(narrow.astype(np.float32), params).q)
