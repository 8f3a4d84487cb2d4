"""Biases of integer products: int32 where it fits, behind the product where it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import per_channel
from qpipe.calibrate.qarray import QParams, Spec
from qpipe.pipeline.forms.bias import LARGEST, int32_bias
from quantizing import Result, calibrate, model, normal, quantize, run

Array = np.ndarray[Any, Any]
INT8 = FORMATS.get("int8")

positive = st.floats(2.0**-126, 2.0**100, allow_subnormal=False, width=32)


def params(scale: Array, *, channels: bool) -> QParams:
    spec = Spec(format=INT8, granularity=per_channel(0)) if channels else Spec(format=INT8)
    return QParams(scale=np.asarray(scale, np.float32), zero_point=None, spec=spec)


@given(
    biases=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=5),
    data=positive,
    weight=st.lists(positive, min_size=5, max_size=5),
)
def test_int32_holds_what_it_is_given_or_nothing(biases: list[float], data: float, weight: list[float]) -> None:
    bias = np.float32(biases)
    scales = np.float32(weight[: len(bias)])[:, None]
    found = int32_bias(bias, params(np.float32(data), channels=False), params(scales, channels=True))
    exact = (np.float64(data) * scales.astype(np.float64)).reshape(-1)
    ideal = np.abs(bias.astype(np.float64) / exact)
    if found is None:
        info = np.finfo(np.float32)
        assert exact.min() < info.tiny or exact.max() > info.max or ideal.max() >= (LARGEST - 1) * (1 - 1e-6)
        return
    codes, scale = found
    assert codes.dtype == np.int32
    assert np.abs(codes.astype(np.int64)).max() < LARGEST
    np.testing.assert_array_equal(scale, exact.astype(np.float32))
    error = np.abs(codes * scale.astype(np.float64) - bias)
    assert (error <= scale.astype(np.float64) / 2 * (1 + 1e-9)).all()


def conv(x: Array, w: Array, b: Array, **recipe: Any) -> Result:
    body = f"g (float[1,4,6,6] x) => (float[1,{len(w)},4,4] y) {{ y = Conv(x, w, b) }}"
    source = model(body, w=w, b=b)
    return quantize(source, calibration=calibrate(source, [{"x": x}]), **{"target": "ort-cpu-avx2", **recipe})


@settings(max_examples=25, deadline=None)
@given(exponent=st.integers(-30, 3), bias=st.floats(-1e4, 1e4, width=32))
def test_what_is_deployed_equals_what_is_written(exponent: int, bias: float) -> None:
    """ONNX Runtime stores a float bias as int32 by itself and would wrap around where that does not fit."""
    x = np.abs(normal(1, 4, 6, 6)) * np.float32(2.0**exponent)
    w = normal(5, 4, 3, 3, seed=1) * np.float32(2.0**exponent)
    found = conv(x, w, np.full(5, bias, np.float32))
    wanted, exact, deployed = (
        run(found.source, {"x": x})[0],
        *(run(found.proto, {"x": x}, exact=flag)[0] for flag in (True, False)),
    )
    step = found.scale_of("y")
    assert np.abs(exact - wanted).max() <= 3 * step + 1e-6 * np.abs(wanted).max()
    assert np.abs(deployed - exact).max() <= step * (1 + 1e-5)


def test_a_bias_beyond_int32_moves_behind_and_is_told() -> None:
    x, w = np.abs(normal(1, 4, 6, 6)) * np.float32(1e-5), normal(5, 4, 3, 3) * np.float32(1e-5)
    found = conv(x, w, np.full(5, 50, np.float32))
    assert found.ops()["Add"] == 1
    (conv_node,) = [n for n in found.proto.graph.node if n.op_type == "Conv"]
    assert len(conv_node.input) == 2
    assert "the bias of 'Conv_0' is added behind it" in found.result.notes[0]


def test_a_bias_that_fits_is_int32_with_the_product_of_scales() -> None:
    x, w, b = normal(1, 4, 6, 6), normal(5, 4, 3, 3), normal(5, seed=3)
    found = conv(x, w, b)
    held = found.initializers()
    assert held["b_quantized"].dtype == np.int32
    scale = np.float32(found.scale_of("x")) * held["w_scale"]
    np.testing.assert_array_equal(held["b_scale"], scale)
    np.testing.assert_array_equal(held["b_quantized"], np.rint(b.astype(np.float64) / scale))
    assert not found.result.notes


@pytest.mark.parametrize("scheme", ["w8a16", "w16a16"])
def test_wide_codes_keep_a_float_bias_that_no_optimizer_can_spoil(scheme: str) -> None:
    x, w, b = normal(1, 4, 6, 6), normal(5, 4, 3, 3), 10 * normal(5, seed=3)
    found = conv(x, w, b, scheme=scheme)
    kinds = {t.name: t.data_type for t in found.proto.graph.initializer}
    assert TensorProto.INT32 not in kinds.values()
    wanted, exact, deployed = (
        run(found.source, {"x": x})[0],
        *(run(found.proto, {"x": x}, exact=flag)[0] for flag in (True, False)),
    )
    assert np.abs(exact - wanted).max() < 0.02 * np.abs(wanted).max()
    assert np.abs(deployed - exact).max() < 1e-3 * np.abs(wanted).max()


def test_gemm_and_graph_outputs_keep_names() -> None:
    x, w, b = np.abs(normal(3, 8)) * np.float32(1e-6), normal(8, 4) * np.float32(1e-6), np.full(4, 9, np.float32)
    source = model("g (float[N,8] x) => (float[N,4] y) { y = Gemm(x, w, b) }", w=w, b=b)
    found = quantize(source, calibration=calibrate(source, [{"x": x}]), target="ort-cpu-avx2")
    assert [o.name for o in found.proto.graph.output] == ["y"]
    assert isinstance(found.proto, onnx.ModelProto)
    np.testing.assert_allclose(run(found.proto, {"x": x}, exact=False)[0], 9, rtol=1e-5)
