"""Packed weights (MatMulNBits, MatMulBnb4) and tables of embeddings: values, packing, ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.calibrate.errors import RecipeError
from qpipe.calibrate.qarray import dequantize
from qpipe.pipeline.forms.nbits import pack_blocks, pack_rows
from qpipe.pipeline.plan import spec_text
from qpipe.pipeline.recipe import make_recipe
from quantizing import Result, model, normal, quantize, run

Array = np.ndarray[Any, Any]


def product(w: Array, **recipe: Any) -> Result:
    source = model(f"g (float[N,{w.shape[0]}] x) => (float[N,{w.shape[1]}] y) {{ y = MatMul(x, w) }}", w=w)
    return quantize(source, target="ort-cpu", **recipe)


def stored(found: Result) -> Array:
    """What the one quantized weight of a result means, in the operator's own layout."""
    (qarray,) = found.result.weights.values()
    return dequantize(qarray)


def agrees(found: Result, x: Array, bias: Array | float = 0.0) -> None:
    expected = x @ stored(found).astype(np.float64) + bias
    tolerance = 1e-5 * np.abs(expected).max()
    for exact in (True, False):
        np.testing.assert_allclose(run(found.proto, {"x": x}, exact=exact)[0], expected, atol=tolerance)


@settings(max_examples=30, deadline=None)
@given(
    depth=st.integers(1, 100),
    outputs=st.integers(1, 20),
    size=st.sampled_from([16, 32, 64]),
    fmt=st.sampled_from(["int4", "uint4", "int8", "uint8"]),
    symmetric=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_nbits_multiplies_by_the_dequantized_weight(
    depth: int, outputs: int, size: int, fmt: str, symmetric: bool, seed: int
) -> None:
    weights = {"format": fmt, "granularity": "block", "block_size": size, "symmetric": symmetric, "accuracy_level": 1}
    w = normal(depth, outputs, seed=seed) + np.float32(0.3)
    found = product(w, scheme="w4", weights=weights)
    assert found.ops() == {"MatMulNBits": 1}
    agrees(found, normal(3, depth, seed=seed + 1))


@settings(max_examples=20, deadline=None)
@given(
    depth=st.integers(1, 100),
    size=st.sampled_from([16, 32]),
    fmt=st.sampled_from(["int4", "uint4"]),
    algorithm=st.sampled_from(["rtn", "rtn_mse", "hqq"]),
    level=st.sampled_from([1, 4]),
)
def test_nbits_takes_zero_points_that_are_no_codes(depth: int, size: int, fmt: str, algorithm: str, level: int) -> None:
    weights = {"format": fmt, "granularity": "block", "block_size": size, "symmetric": False, "algorithm": algorithm}
    w = normal(depth, 7, seed=depth) + np.float32(0.3)
    found = product(w, scheme="w4", weights={**weights, "accuracy_level": level, "float_zero_points": True})
    assert found.ops() == {"MatMulNBits": 1}
    assert found.initializers()["w_zero_points"].dtype == np.float32
    assert "float zero points" in spec_text(next(d.spec for d in found.sites("MatMul_0") if d.spec))
    agrees(found, normal(3, depth, seed=depth + 1))


def test_float_zero_points_fall_back_to_codes_where_they_must_be() -> None:
    body = "g (float[1,32,4,4] x) => (float[1,8,4,4] y) { y = Conv(x, w) }"
    weights = {"algorithm": "hqq", "float_zero_points": True}
    found = quantize(model(body, w=normal(8, 32, 1, 1)), scheme="w4", target="ort-cpu", weights=weights)
    wide = product(
        normal(64, 8), scheme="w4", weights={**weights, "format": "uint8", "symmetric": False, "accuracy_level": 1}
    )
    for qarray in (*found.result.weights.values(), *wide.result.weights.values()):
        assert qarray.params.zero_point is not None
        assert qarray.params.zero_point.dtype == qarray.params.spec.format.dtype
    agrees(wide, normal(3, 64, seed=9))
    for target in ("portable", "openvino"):
        with pytest.raises(RecipeError, match="takes zero points which are no codes"):
            quantize(model(body, w=normal(8, 32, 1, 1)), scheme="w4", target=target, weights=weights)
    with pytest.raises(RecipeError, match="symmetric codes have none"):
        make_recipe(scheme="w4", weights={"float_zero_points": True, "symmetric": True})


def test_float_zero_points_of_a_half_precision_model() -> None:
    source = model("g (float16[N,64] x) => (float16[N,24] y) { y = MatMul(x, w) }", w=normal(64, 24).astype(np.float16))
    found = quantize(source, scheme="w4", target="ort-cuda", weights={"algorithm": "hqq", "float_zero_points": True})
    assert found.ops() == {"MatMulNBits": 1}
    assert found.initializers()["w_zero_points"].dtype == np.float16
    x = normal(3, 64, seed=2).astype(np.float16)
    expected = x.astype(np.float64) @ stored(found)
    got = run(found.proto, {"x": x})[0]
    np.testing.assert_allclose(got, expected, atol=4e-3 * np.abs(expected).max())


def test_nbits_rounds_activations_as_the_target_or_the_recipe_says() -> None:
    w = normal(64, 32)
    for given_level, expected in ((None, 4), (1, 1), (0, 0)):
        found = product(w, scheme="w4", weights={"accuracy_level": given_level})
        attributes = {a.name: a.i for a in found.proto.graph.node[0].attribute}
        assert attributes == {"K": 64, "N": 32, "bits": 4, "block_size": 32, "accuracy_level": expected}
    assert found.result.model.opset == 21


def test_nbits_needs_no_newer_opset() -> None:
    source = model("g (float[N,32] x) => (float[N,8] y) { y = MatMul(x, w) }", opset=13, ir=7, w=normal(32, 8))
    assert quantize(source, scheme="w4").result.model.opset == 13
    assert quantize(source, scheme="w4", target="portable").result.model.opset == 21


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("scheme", ["w4", "w4-nf4"])
def test_gemm_keeps_its_bias(transposed: int, scheme: str) -> None:
    w, b = normal(10, 64) if transposed else normal(64, 10), normal(10, seed=4)
    body = f"g (float[N,64] x) => (float[N,10] y) {{ y = Gemm<transB={transposed}>(x, w, b) }}"
    weights = {"accuracy_level": 1}
    found = quantize(model(body, w=w, b=b), scheme=scheme, target="ort-cpu", weights=weights)
    (qarray,) = found.result.weights.values()
    real = dequantize(qarray)
    x = normal(3, 64, seed=8)
    expected = x @ (real.T if transposed else real) + b
    np.testing.assert_allclose(run(found.proto, {"x": x})[0], expected, atol=1e-4)


@pytest.mark.parametrize("fmt", ["nf4", "bnb_fp4"])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_bnb4_multiplies_by_the_codebook(fmt: str, size: int) -> None:
    found = product(normal(128, 24), scheme="w4-nf4", weights={"format": fmt, "block_size": size})
    assert found.ops() == {"MatMulBnb4": 1}
    agrees(found, normal(5, 128, seed=3))


def test_bnb4_leaves_what_its_blocks_do_not_divide() -> None:
    found = product(normal(96, 24), scheme="w4-nf4")
    assert found.ops() == {"MatMul": 1}
    assert "divide its 96 inputs" in found.reason("MatMul_0")


@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from([4, 8]), st.sampled_from([16, 32]), st.integers(0, 99))
def test_packing_puts_the_first_code_low(rows: int, columns: int, bits: int, size: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    packed = pack_rows(codes, bits)
    unpacked = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=2).reshape(rows, -1)
    np.testing.assert_array_equal(unpacked[:, :columns], codes)
    blocks = pack_blocks(codes, bits, size)
    assert blocks.shape == (rows, -(-columns // size), size * bits // 8)


def lookup(table: Array, scheme: str = "w8", **weights: Any) -> Result:
    body = f"g (int64[N] i) => (float[N,{table.shape[1]}] y) {{ y = Gather(t, i) }}"
    return quantize(model(body, t=table), scheme=scheme, weights={"embeddings": True, **weights})


@pytest.mark.parametrize("scheme", ["w8", "w4"])
def test_a_table_is_read_row_by_row(scheme: str) -> None:
    table, places = normal(50, 12) * np.linspace(0.1, 9, 50, dtype=np.float32)[:, None], np.array([0, 49, 7, 7])
    found = lookup(table, scheme)
    assert found.ops() == {"Gather": 2, "Cast": 1, "Mul": 1}
    (qarray,) = found.result.weights.values()
    assert qarray.params.scale.shape == (50, 1)
    for exact in (True, False):
        np.testing.assert_array_equal(
            run(found.proto, {"i": places}, exact=exact)[0], dequantize(qarray)[places], strict=True
        )
    assert np.abs(dequantize(qarray) - table).max(axis=1) == pytest.approx(0, abs=9 * 5 / 127)


def test_tables_stay_float_unless_asked_for() -> None:
    found = quantize(model("g (int64[N] i) => (float[N,4] y) { y = Gather(t, i) }", t=normal(9, 4)), scheme="w8")
    assert "embedding" in found.reason("Gather_0")
    excluded = model("g (int64[N] i) => (float[N,4] y) { y = Gather(t, i) }", t=normal(9, 4))
    kept = quantize(excluded, scheme="w8", weights={"embeddings": True}, exclude=("Gather_0",))
    assert "excluded" in kept.reason("Gather_0")


def test_a_table_that_is_also_a_weight_is_stored_for_each_use() -> None:
    body = """g (int64[N] i) => (float[N,40] y) {
        e = Gather(t, i)  w = Transpose<perm=[1,0]>(t)  y = MatMul(e, w)
    }"""
    found = quantize(model(body, t=normal(40, 16)), scheme="w8", weights={"embeddings": True})
    held = {
        name: array.shape for name, array in found.initializers().items() if array.dtype == np.int8 and array.ndim == 2
    }
    assert sorted(held.values()) == [(16, 40), (40, 16)]
    source = run(found.source, {"i": np.arange(5)})[0]
    assert np.abs(run(found.proto, {"i": np.arange(5)})[0] - source).max() < 0.05 * np.abs(source).max()
    assert onnx.TensorProto.FLOAT not in {
        t.data_type for t in found.proto.graph.initializer if int(np.prod(t.dims)) > 40
    }
