"""The Q/DQ checker complains about nothing that ONNX Runtime's own quantizers write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from qpipe.pipeline import graph
from qpipe.pipeline.qdq_check import check_qdq


def findings(proto: onnx.ModelProto, target: str | None = None) -> dict[str, str]:
    """Return rule -> severity."""
    return {f.rule: f.severity for f in check_qdq(graph.from_proto(proto), target=target)}


def _float_net(opset: int) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    text = f"""<ir_version: 8, opset_import: ["": {opset}]> g (float[N,3,8,8] x) => (float[N,5] y) {{
        c = Conv <pads = [1,1,1,1]>(x, w1, b1)  r = Relu(c)  e = Conv <pads = [1,1,1,1]>(r, w2, b2)
        a = Add(r, e)  k = Concat <axis = 1>(a, e)  p = MaxPool <kernel_shape = [2,2], strides = [2,2]>(k)
        v = GlobalAveragePool(p)  f = Flatten(v)  h = Gemm <transB = 1>(f, w3, b3)
        t = Transpose <perm = [0,1]>(h)  q = Sigmoid(t)  m = Mul(t, q)  y = MatMul(m, w4) }}"""
    model = parser.parse_model(text)
    shapes = {"w1": (4, 3, 3, 3), "b1": (4,), "w2": (4, 4, 3, 3), "b2": (4,), "w3": (6, 8), "b3": (6,), "w4": (6, 5)}
    for name, shape in shapes.items():
        array = rng.normal(scale=0.3, size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


ORT_OPTIONS: dict[str, Callable[[], dict[str, object]]] = {
    "defaults": dict,
    "per channel": lambda: {"per_channel": True},
    "per channel, 7 bits": lambda: {"per_channel": True, "reduce_range": True},
    "signed": lambda: {"activation_type": "QInt8", "per_channel": True},
    "unsigned weights": lambda: {"activation_type": "QUInt8", "weight_type": "QUInt8"},
    "16 bits": lambda: {"activation_type": "QUInt16", "weight_type": "QInt8"},
    "16 bits in the contrib domain": lambda: {"activation_type": "QInt16", "extra_options": {"UseQDQContribOps": True}},
    "4-bit weights": lambda: {"weight_type": "QInt4"},
    "symmetric": lambda: {"extra_options": {"ActivationSymmetric": True, "WeightSymmetric": True}},
    "dedicated pairs": lambda: {"extra_options": {"DedicatedQDQPair": True}},
    "pairs on weights": lambda: {"extra_options": {"AddQDQPairToWeight": True}, "per_channel": True},
    "float bias": lambda: {"extra_options": {"QuantizeBias": False}},
}


@pytest.mark.parametrize("opset", [13, 17, 21, 23])
@pytest.mark.parametrize("options", ORT_OPTIONS)
def test_no_false_alarm_on_what_onnxruntime_writes(options: str, opset: int, tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            rng = np.random.default_rng(1)
            self._batches = iter([{"x": rng.normal(size=(2, 3, 8, 8)).astype(np.float32)} for _ in range(2)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._batches, None)

    keywords = dict(ORT_OPTIONS[options]())
    for name in ("activation_type", "weight_type"):
        if name in keywords:
            keywords[name] = getattr(quantization.QuantType, str(keywords[name]))
    path = tmp_path / "q.onnx"
    quantization.quantize_static(_float_net(opset), path, Reader(), **keywords)
    found = check_qdq(graph.load(path))
    assert found == []


def test_no_false_alarm_on_blocked_and_dynamic_forms_of_onnxruntime(tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    nbits = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[2,64] x) => (float[2,8] y) { y = MatMul(x, w) }'
    )
    weight = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    weight[:32, 0] = 0
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    for symmetric in (True, False):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        config = nbits.DefaultWeightOnlyQuantConfig(
            block_size=32, is_symmetric=symmetric, quant_format=quantization.QuantFormat.QDQ
        )
        quantizer = nbits.MatMulNBitsQuantizer(copy, algo_config=config)
        quantizer.process()
        assert "DequantizeLinear" in {node.op_type for node in quantizer.model.model.graph.node}
        assert findings(quantizer.model.model) == {}
        assert "scale-positive" in findings(quantizer.model.model, "tensorrt")
    quantization.quantize_dynamic(model, tmp_path / "d.onnx")
    assert check_qdq(graph.load(tmp_path / "d.onnx")) == []
