"""Half precision: what is converted, what stays in float32 and why, and models that come in half precision."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from qpipe.calibrate.errors import RecipeError
from qpipe.pipeline.cpu import int8_saturates
from qpipe.pipeline.graph import from_proto, to_proto
from qpipe.pipeline.precision import border_types, half_nodes, widen
from qpipe.pipeline.stages.prepare import prepare
from quantizing import Result, calibrate, model, normal, quantize, run
from random_graphs import models

Array = np.ndarray[Any, Any]

HALF = {"float16": (np.float16, TensorProto.FLOAT16), "bfloat16": (ml_dtypes.bfloat16, TensorProto.BFLOAT16)}
NETWORK = "a = MatMul(x, w1)  c = Add(a, b1)  r = Relu(c)  y = MatMul(r, w2)"


def network(kind: str = "float", dtype: Any = np.float32) -> onnx.ModelProto:
    weights = {"w1": normal(16, 32) / 4, "b1": normal(32), "w2": normal(32, 8, seed=2) / 6}
    body = f"g ({kind}[N,16] x) => ({kind}[N,8] y) {{ {NETWORK} }}"
    return model(body, **{name: array.astype(dtype) for name, array in weights.items()})


def convert(source: onnx.ModelProto, batches: list[dict[str, Array]] | None = None, **recipe: Any) -> Result:
    calibration = calibrate(source, batches) if batches is not None else None
    return quantize(source, calibration=calibration, **{"scheme": "fp16", "target": "portable", **recipe})


def types_of(found: Result) -> dict[str, int]:
    """Element type of every constant by name."""
    return {tensor.name: tensor.data_type for tensor in found.proto.graph.initializer}


def borders(proto: onnx.ModelProto) -> list[int]:
    return [v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)]


def casts(found: Result) -> int:
    return found.ops()["Cast"]


@pytest.mark.parametrize("kind", HALF)
def test_everything_is_converted_and_the_border_keeps_its_type(kind: str) -> None:
    found = convert(network(), float_type=kind)
    assert set(types_of(found).values()) == {HALF[kind][1]}
    assert borders(found.proto) == [TensorProto.FLOAT, TensorProto.FLOAT]
    assert casts(found) == 2
    assert {d.spec.format.name for d in found.plan.quantized() if d.spec} == {kind}


def test_the_border_is_converted_on_request() -> None:
    found = convert(network(), keep_io=False)
    assert borders(found.proto) == [TensorProto.FLOAT16, TensorProto.FLOAT16]
    assert casts(found) == 0
    assert found.ops() == {"MatMul": 2, "Add": 1, "Relu": 1}


def test_values_are_those_of_float16_operators() -> None:
    """Against numpy, rounded to float16 behind each operator; sums may be rounded once or often."""
    found, x = convert(network()), normal(5, 16, seed=7)
    held = {name: array.astype(np.float32) for name, array in found.initializers().items()}
    for name, array in held.items():
        np.testing.assert_array_equal(array, numpy_helper.to_array(_initializer(found.source, name)).astype(np.float16))
    half = np.float16
    hidden = np.maximum((x.astype(half).astype(np.float32) @ held["w1"]).astype(half) + held["b1"].astype(half), 0)
    expected = (hidden.astype(np.float32) @ held["w2"]).astype(half)
    got = run(found.proto, {"x": x})[0]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.astype(np.float32), atol=2e-3 * np.abs(expected).max())


def _initializer(proto: onnx.ModelProto, name: str) -> TensorProto:
    return next(t for t in proto.graph.initializer if t.name == name)


def test_what_exceeds_float16_stays_in_float32_with_its_number() -> None:
    body = "g (float[N,4] x) => (float[N,4] y) { a = Mul(x, big)  b = Mul(a, small)  y = Add(b, one) }"
    weights = {"big": np.float32([1e5]), "small": np.float32([1e-3]), "one": np.float32([1])}
    source = model(body, **weights)
    found = convert(source, [{"x": np.float32([[1, 2, 3, 4]])}])
    reasons = {name: d.reason for name, d in found.plan.nodes().items() if d.spec is None}
    assert set(reasons) == {"Mul_0", "Mul_1"}
    assert "'big' reaches 100000, beyond float16 (65504)" in reasons["Mul_0"]
    assert "'a' reaches 400000, beyond float16 (65504)" in reasons["Mul_1"]
    got = run(found.proto, {"x": np.float32([[1, 2, 3, 4]])})[0]
    np.testing.assert_allclose(got, [[101, 201, 301, 401]], rtol=1e-3)


def test_without_statistics_it_says_that_nothing_was_looked_up() -> None:
    found = convert(network())
    assert "was not looked up" in found.result.notes[0]
    assert not convert(network(), [{"x": normal(2, 16)}]).result.notes


def test_a_constant_that_would_vanish_stays_in_float32() -> None:
    body = "g (float[N,4] x) => (float[N,4] y) { v = Mul(x, x)  e = Add(v, epsilon)  s = Sqrt(e)  y = Div(x, s) }"
    found = convert(model(body, epsilon=np.float32([1e-12])), [{"x": normal(3, 4)}])
    assert "vanishes in float16" in found.reason("Add_1")
    assert types_of(found) == {"epsilon": TensorProto.FLOAT}
    assert np.isfinite(run(found.proto, {"x": np.float32([[1, -1, 2, 3]])})[0]).all()


def test_masks_stay_in_float32() -> None:
    body = "g (float[N,4] x, bool[N,4] m) => (float[N,4] y) { w = Where(m, x, lowest)  y = Softmax(w) }"
    source = model(body, lowest=np.float32([np.finfo(np.float32).min]))
    batch = {"x": normal(2, 4), "m": np.array([[True, True, False, False]] * 2)}
    found = convert(source, [batch])
    assert "beyond float16" in found.reason("Where_0")
    assert "mask values" in found.reason("Softmax_1")
    np.testing.assert_array_equal(run(found.proto, batch)[0], run(source, batch)[0])


def test_operators_without_the_type_stay() -> None:
    body = "g (float[1,1,4,4] x) => (float[1,1,2,2] y) { c = Conv(x, w)  y = Relu(c) }"
    found = convert(model(body, opset=21, w=normal(1, 1, 3, 3)), float_type="bfloat16")
    assert "takes no bfloat16 at opset 21" in found.reason("Conv_0")
    newer = convert(model(body, opset=22, w=normal(1, 1, 3, 3)), float_type="bfloat16")
    assert newer.plan.nodes()["Conv_0"].spec is not None


def test_ort_cpu_keeps_what_it_would_take_apart() -> None:
    source = model("g (float[N,4] x) => (float[N,4] y) { a = MatMul(x, w)  y = Softmax(a) }", w=normal(4, 4))
    found = convert(source, target="ort-cpu")
    assert "would take it apart" in found.reason("Softmax_1")
    assert found.plan.nodes()["MatMul_0"].spec is not None


def test_ort_cpu_refuses_bfloat16() -> None:
    with pytest.raises(RecipeError, match="ort-cpu has no bfloat16") as caught:
        convert(network(), scheme="bf16", target="ort-cpu")
    assert "--target" in str(caught.value)


def test_bodies_and_shared_constants() -> None:
    body = """g (float[N,4] x, bool c) => (float[N,4] y) {
        h = MatMul(x, w)
        y = If(c)<
            then_branch = t () => (float[N,4] a) { a = MatMul(h, w) },
            else_branch = e () => (float[N,4] b) { u = Mul(h, big)  b = Mul(u, tiny) }
        >
    }"""
    weights = {"w": normal(4, 4), "big": np.float32([1e9]), "tiny": np.float32([1e-9])}
    source = model(body, **weights)
    batches = [{"x": normal(2, 4), "c": np.array(flag)} for flag in (True, False)]
    found = convert(source, batches)
    assert types_of(found)["w"] == TensorProto.FLOAT16
    for batch in batches:
        np.testing.assert_allclose(run(found.proto, batch)[0], run(source, batch)[0], atol=0.02)


@pytest.mark.parametrize("target", ["tensorrt", "ort-cpu"])
def test_a_quantized_model_with_a_float16_remainder(target: str) -> None:
    """TensorRT takes float16 scales; ONNX Runtime fuses float32 ones only."""
    batches = [{"x": normal(4, 16, seed=s)} for s in range(3)]
    found = convert(network(), batches, scheme="w8a8", target=target, float_type="float16")
    scales = {t.data_type for t in found.proto.graph.initializer if t.name.endswith("_scale")}
    assert scales == {TensorProto.FLOAT16 if target == "tensorrt" else TensorProto.FLOAT}
    difference = run(found.proto, batches[0])[0] - run(found.source, batches[0])[0]
    assert np.abs(difference).max() < 0.05


def test_scales_that_float16_cannot_hold_stay_in_float32() -> None:
    source = model("g (float[N,8] x) => (float[N,8] y) { y = MatMul(x, w) }", w=normal(8, 8) * np.float32(1e-3))
    found = convert(source, [{"x": normal(2, 8)}], scheme="w8a8", target="tensorrt", float_type="float16")
    held = {name: array for name, array in found.initializers().items() if name.endswith("_scale")}
    assert held["w_scale"].dtype == np.float32
    assert held["x_scale"].dtype == np.float16
    got, wanted = (run(p, {"x": normal(2, 8)})[0] for p in (found.proto, source))
    assert np.abs(got - wanted).max() < 0.03 * np.abs(wanted).max()


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w8", "w4", "w8-global"])
@pytest.mark.parametrize("target", ["ort-cpu", "portable", "tensorrt"])
@pytest.mark.parametrize("kind", HALF)
def test_models_that_come_in_half_precision(kind: str, target: str, scheme: str) -> None:
    """Every scheme and target: border and remainder keep their type, the result is valid and near."""
    dtype, number = HALF[kind]
    source = network(kind, dtype)
    batch = {"x": normal(4, 16).astype(np.float16 if kind == "float16" else np.float32)}
    found = quantize(source, calibration=calibrate(source, [batch]), scheme=scheme, target=target)
    assert borders(found.proto) == [number, number]
    assert types_of(found)["b1"] == number
    assert found.result.model.opset == 21
    if kind == "bfloat16" and target == "ort-cpu":
        assert "will not run there" in found.result.notes[0]
    if kind == "float16":
        got, wanted = (run(p, batch)[0].astype(np.float32) for p in (found.proto, source))
        saturates = (target, scheme) == ("portable", "w8a8-dynamic") and int8_saturates()  # full 8 bits: no pair limit
        assert np.abs(got - wanted).max() < (0.6 if scheme == "w4" or saturates else 0.12)


def test_bfloat16_models_are_calibrated_in_a_float32_twin() -> None:
    dtype, _ = HALF["bfloat16"]
    half, x = network("bfloat16", dtype), normal(6, 16)
    single = network()
    for tensor in single.graph.initializer:
        array = numpy_helper.to_array(tensor).astype(dtype).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    found, expected = (calibrate(m, [{"x": x}]).tensors for m in (half, single))
    assert list(found) == list(expected)
    assert all(found[name].histogram == expected[name].histogram for name in found)


@settings(max_examples=40, deadline=None)
@given(models(), st.sampled_from(sorted(HALF)))
def test_any_graph_comes_back_from_half_precision(source: onnx.ModelProto, kind: str) -> None:
    """Converting to half precision and widening again gives a valid float32 model of the same operators."""
    converted = convert(source, float_type=kind)
    prepared = prepare(from_proto(converted.proto))
    widen(prepared.graph)
    assert half_nodes(prepared.graph) == {}
    assert set(border_types(prepared.graph).values()) <= {"float32"}
    proto = to_proto(prepared)
    onnx.checker.check_model(proto, full_check=True)
    assert {n.op_type for n in proto.graph.node} - {"Cast"} <= {n.op_type for n in converted.proto.graph.node}
