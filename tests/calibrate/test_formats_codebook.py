"""Codebook formats against ONNX Runtime's MatMulBnb4: values, packing and codes."""

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi._pybind_state import quantize_matmul_bnb4
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.formats.codebook import BNB4_QUANT_TYPE, pack_bnb4, unpack_bnb4
from qpipe.calibrate.granularity import per_block
from qpipe.calibrate.qarray import (
    QArray,
    Spec,
    dequantize,
    minmax_range,
    params_from_range,
    params_from_scale,
    quantize,
)

BOOKS = sorted(BNB4_QUANT_TYPE)


def matmul_bnb4(a, codes, amax, name, block_size):
    """Run ``a [M, K] @ w [N, K].T`` in ONNX Runtime with optimizations off."""
    n, k = codes.shape
    node = helper.make_node(
        "MatMulBnb4",
        ["a", "b", "amax"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        block_size=block_size,
        quant_type=BNB4_QUANT_TYPE[name],
    )
    infos = [helper.make_tensor_value_info(i, TensorProto.FLOAT, [None, None]) for i in ("a", "y")]
    initializers = [numpy_helper.from_array(pack_bnb4(codes), "b"), numpy_helper.from_array(amax.ravel(), "amax")]
    graph = helper.make_graph([node], "g", infos[:1], infos[1:], initializers)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"a": a})[0]


def quantize_weights(w, name, block_size):
    spec = Spec(format=FORMATS.get(name), granularity=per_block(1, block_size))
    return quantize(w, params_from_range(minmax_range(w, spec.granularity), spec))


@pytest.mark.parametrize("name", BOOKS)
def test_every_code_means_what_the_operator_computes(name):
    """An identity matrix reads the dequantized weights out of the operator, exactly."""
    codes = np.stack([np.arange(16), np.arange(16)[::-1]]).astype(ml_dtypes.uint4)
    amax = np.array([[1.0], [3.0]], np.float32)
    spec = Spec(format=FORMATS.get(name), granularity=per_block(1, 16))
    values = dequantize(QArray(q=codes, params=params_from_scale(amax, spec)))
    theirs = matmul_bnb4(np.eye(16, dtype=np.float32), codes, amax, name, 16)
    assert np.array_equal(theirs.T, values)


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("name", BOOKS)
def test_quantized_weights_multiply_as_dequantized_ones(name, block_size):
    w = np.random.default_rng(0).standard_normal((24, 256)).astype(np.float32)
    qarray = quantize_weights(w, name, block_size)
    theirs = matmul_bnb4(np.eye(256, dtype=np.float32), qarray.q, qarray.params.scale, name, block_size)
    assert np.array_equal(theirs.T, dequantize(qarray))


@pytest.mark.parametrize("name", BOOKS)
def test_codes_are_those_of_the_runtimes_own_quantizer(name):
    """Minus zero apart: of FP4's two zeros only the first is used. Both quantizers take the nearest value."""
    w = np.random.default_rng(3).standard_normal((512, 1024)).astype(np.float32)
    qarray = quantize_weights(w, name, 64)
    packed, amax = np.zeros(w.size // 2, np.uint8), np.zeros(w.size // 64, np.float32)
    quantize_matmul_bnb4(packed, w, amax, 64, BNB4_QUANT_TYPE[name], *w.shape)
    assert np.array_equal(amax, qarray.params.scale.ravel())
    theirs = unpack_bnb4(packed, w.shape).astype(int)
    if name == "bnb_fp4":
        theirs[theirs == 8] = 0
    assert np.array_equal(theirs, qarray.q.astype(int))


def test_first_code_is_packed_into_the_high_half():
    assert pack_bnb4(np.array([[1, 2], [3, 15]], ml_dtypes.uint4)).tolist() == [0x12, 0x3F]
    assert pack_bnb4(np.array([7], ml_dtypes.uint4)).tolist() == [0x70]


@pytest.mark.parametrize("shape", [(1,), (3, 5), (4, 8), (2, 3, 4)])
def test_packing_can_be_undone(shape):
    codes = np.random.default_rng(4).integers(0, 16, shape).astype(ml_dtypes.uint4)
    assert np.array_equal(unpack_bnb4(pack_bnb4(codes), shape), codes)


@pytest.mark.parametrize("name", BOOKS)
def test_ends_zero_and_what_lies_beyond(name):
    spec = Spec(format=FORMATS.get(name))
    params = params_from_scale(np.float32(2), spec)
    x = np.array([-np.inf, -9, -2, 0, -0.0, 2, 9, np.inf], np.float32)
    assert dequantize(quantize(x, params)).tolist() == [-2, -2, -2, 0, 0, 2, 2, 2]
