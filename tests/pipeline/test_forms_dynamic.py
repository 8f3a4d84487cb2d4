"""DynamicQuantizeLinear + MatMulInteger: values, sharing, and what ONNX Runtime makes of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from qpipe.calibrate.errors import RecipeError
from qpipe.calibrate.weights.pairs import PAIR_LIMIT
from qpipe.pipeline.graph import from_proto
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.session import SessionExtras, make_session
from qpipe.pipeline.stages.prepare import prepare
from qpipe.pipeline.stages.quantize import quantize_model
from quantizing import Result, model, normal, quantize, run

Array = np.ndarray[Any, Any]


def dynamic(source: onnx.ModelProto, **recipe: Any) -> Result:
    return quantize(source, scheme="w8a8-dynamic", **{"target": "ort-cpu-avx2", **recipe})


def one_product(w: Array) -> onnx.ModelProto:
    return model(f"g (float[N,{w.shape[0]}] x) => (float[N,{w.shape[1]}] y) {{ y = MatMul(x, w) }}", w=w)


def optimized(proto: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Operators after ONNX Runtime's optimizer."""
    path = folder / "optimized.onnx"
    make_session(proto, extras=SessionExtras(optimized_model=path))
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def quantize_at_run_time(x: Array) -> tuple[Array, np.float32, int]:
    """DynamicQuantizeLinear as ONNX defines it."""
    low, high = np.minimum(np.float32(0), x.min()), np.maximum(np.float32(0), x.max())
    scale = np.float32((high - low) / np.float32(255))
    zero = int(np.clip(np.rint(-low / scale), 0, 255))
    return np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64), scale, zero


def oracle(found: Result, x: Array) -> Array:
    """The product of codes in exact integers."""
    held = found.initializers()
    node = next(n for n in found.proto.graph.node if n.op_type == "MatMulInteger")
    weight = held[node.input[1]].astype(np.int64)
    if len(node.input) > 3:
        weight = weight - held[node.input[3]].astype(np.int64)
    scales = next(n for n in found.proto.graph.node if n.op_type == "Mul")
    codes, scale, zero = quantize_at_run_time(x)
    return ((codes - zero) @ weight).astype(np.float32) * (scale * held[scales.input[1]])


@pytest.mark.parametrize("scheme", ["w8", "w8a8-dynamic"])
def test_codes_of_a_weight_are_made_when_they_are_saved(scheme: str) -> None:
    source, recipe = one_product(normal(512, 300)), make_recipe(scheme=scheme, target="ort-cpu-vnni")
    graph = quantize_model(prepare(from_proto(source)), recipe).model.graph
    held = [t._values for node in graph.nodes for t in node.inputs if isinstance(t, gs.Constant) and t.dtype == np.int8]
    assert [values.takes_work for values in held if values.shape == (512, 300)] == [True]


@settings(max_examples=40, deadline=None)
@given(
    depth=st.integers(1, 70),
    outputs=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    tail=st.sampled_from([0.0, 1.0]),
)
def test_it_equals_exact_integers_on_every_cpu(depth: int, outputs: int, seed: int, tail: float) -> None:
    """Also where 16-bit sums saturate: weights of this target keep pairs within what they hold."""
    rng = np.random.default_rng(seed)
    w = (rng.normal(size=(depth, outputs)) + tail * np.sign(rng.normal(size=(depth, outputs)))).astype(np.float32)
    x = np.abs(rng.normal(size=(3, depth))).astype(np.float32)
    x[0] = 1.0  # all codes at the top: the sums that saturate first
    found = dynamic(one_product(w))
    expected = oracle(found, x)
    for exact in (True, False):
        np.testing.assert_allclose(run(found.proto, {"x": x}, exact=exact)[0], expected, rtol=2e-6, atol=1e-30)


def test_weights_of_cpus_without_vnni_keep_to_the_pair_limit() -> None:
    found = dynamic(one_product(np.ones((64, 8), np.float32)))
    codes = found.initializers()["w_quantized"].astype(np.int32)
    assert (codes[0::2] + codes[1::2]).max() <= PAIR_LIMIT
    exact = dynamic(one_product(np.ones((64, 8), np.float32)), target="ort-cpu-vnni")
    assert (exact.initializers()["w_quantized"] == 127).all()


def test_one_product_becomes_one_kernel(tmp_path: Path) -> None:
    found = dynamic(one_product(normal(32, 16)))
    expected = {"DynamicQuantizeLinear": 1, "MatMulInteger": 1, "Cast": 1, "Mul": 2}
    assert found.ops() == expected
    assert optimized(found.proto, tmp_path) == {"DynamicQuantizeMatMul": 1}
    assert found.result.model.opset == 21


def test_a_bias_behind_goes_along(tmp_path: Path) -> None:
    body = "g (float[N,32] x) => (float[N,16] y) { a = MatMul(x, w)  y = Add(a, b) }"
    found = dynamic(model(body, w=normal(32, 16), b=normal(16)))
    assert optimized(found.proto, tmp_path) == {"DynamicQuantizeMatMul": 1}


def test_products_of_one_tensor_share_its_quantizer(tmp_path: Path) -> None:
    body = (
        "g (float[N,32] x) => (float[N,16] y) { a = MatMul(x, q) b = MatMul(x, k) c = MatMul(x, v) y = Sum(a, b, c) }"
    )
    weights = {"q": normal(32, 16, seed=1), "k": normal(32, 16, seed=2), "v": normal(32, 16, seed=3)}
    found = dynamic(model(body, **weights))
    assert found.ops()["DynamicQuantizeLinear"] == 1
    assert found.ops()["MatMulInteger"] == 3
    assert optimized(found.proto, tmp_path)["MatMulIntegerToFloat"] == 3


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_with_bias(transposed: int, tmp_path: Path) -> None:
    w, b = normal(16, 32) if transposed else normal(32, 16), normal(16, seed=5)
    body = f"g (float[N,32] x) => (float[N,16] y) {{ y = Gemm<transB={transposed}>(x, w, b) }}"
    found, x = dynamic(model(body, w=w, b=b)), normal(4, 32, seed=9)
    np.testing.assert_allclose(run(found.proto, {"x": x})[0], oracle(found, x) + b, rtol=1e-5, atol=1e-5)
    assert optimized(found.proto, tmp_path) == {"DynamicQuantizeMatMul": 1}


@pytest.mark.parametrize("attributes", ["alpha=2.0", "beta=0.5", "transA=1"])
def test_a_gemm_that_scales_or_transposes_stays_float(attributes: str) -> None:
    body = f"g (float[32,32] x) => (float[32,16] y) {{ y = Gemm<{attributes}>(x, w, b) }}"
    found = dynamic(model(body, w=normal(32, 16), b=normal(16)))
    assert "scales its operands or transposes" in found.reason("Gemm_0")


def test_asymmetric_and_per_tensor_weights() -> None:
    x = normal(5, 24, seed=2)
    for weights in ({"format": "uint8", "symmetric": False}, {"granularity": "tensor"}):
        found = dynamic(one_product(normal(24, 6) + np.float32(0.5)), weights=weights, target="ort-cpu-vnni")
        assert np.abs(run(found.proto, {"x": x})[0] - run(found.source, {"x": x})[0]).max() < 0.5
    weight = next(n for n in found.proto.graph.node if n.op_type == "Mul").input[1]
    assert found.initializers()[weight].shape == ()


def test_opset_10_is_raised_to_the_one_that_has_the_quantizer() -> None:
    source = model("g (float[N,8] x) => (float[N,4] y) { y = MatMul(x, w) }", opset=10, ir=5, w=normal(8, 4))
    assert dynamic(source).result.model.opset == 11


def test_conv_and_stacks_of_matrices_stay_float_with_a_reason() -> None:
    conv = model("g (float[1,3,8,8] x) => (float[1,4,6,6] y) { y = Conv(x, w) }", w=normal(4, 3, 3, 3))
    assert "gains nothing from Conv with scales found at run time" in dynamic(conv).reason("Conv_0")
    stack = model("g (float[2,3,8] x) => (float[2,3,4] y) { y = MatMul(x, w) }", w=normal(2, 8, 4))
    assert "stack of matrices" in dynamic(stack).reason("MatMul_0")


@pytest.mark.parametrize("activations", [{"format": "int8"}, {"symmetric": True}])
def test_what_the_operator_cannot_give_is_refused(activations: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="asymmetric uint8"):
        dynamic(one_product(normal(8, 4)), activations={"dynamic": True, **activations})


def test_a_weight_with_two_users_is_stored_once() -> None:
    body = "g (float[N,16] x) => (float[N,16] y) { a = MatMul(x, w) y = MatMul(a, w) }"
    found = dynamic(model(body, w=normal(16, 16)))
    codes = [t for t in found.proto.graph.initializer if numpy_helper.to_array(t).dtype == np.int8]
    assert len(codes) == 1
