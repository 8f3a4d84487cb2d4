"""Passes of targets rewrite for speed and change nothing that is computed."""

from __future__ import annotations

import inspect

import numpy as np
import onnx
import pytest
from qpipe.pipeline import graph
from qpipe.pipeline.fusion import ort
from qpipe.pipeline.passes import TARGET_PASSES
from qpipe.pipeline.passes.floor_masked_softmax import FLOOR
from qpipe.pipeline.stages.prepare import prepare
from qpipe.pipeline.stages.tune import describe_passes, tune
from qpipe.pipeline.targets import TARGETS
from quantizing import Array, Batch, model, normal, quantize, run

RESIDUAL = """g (float[N,8] x, float[N,8] r) => (float[N,8] y) {
  s = Add(x, r)
  y = LayerNormalization<axis=-1>(s, g, b)
}"""
NORM = {"g": normal(8), "b": normal(8, seed=1)}
MASKED = """g (float[N,H,T,T] s, float[N,1,T,T] m) => (float[N,H,T,T] y) {
  x = Add(s, m)
  y = Softmax<axis=-1>(x)
}"""


def tuned(source: onnx.ModelProto, target: str = "ort-cpu") -> tuple[onnx.ModelProto, dict[str, int]]:
    found = prepare(graph.from_proto(source))
    counts = tune(found, target)
    return graph.to_proto(found), counts


def ops(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def same(source: onnx.ModelProto, batch: Batch, tolerance: float = 1e-6) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Tune for ort-cpu, and hold the result against the source, as written and as optimized."""
    result, counts = tuned(source)
    onnx.checker.check_model(result, full_check=True)
    for exact in (True, False):
        for wanted, got in zip(run(source, batch), run(result, batch, exact=exact), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)
    return result, counts


def test_targets_name_passes_that_exist_and_say_why() -> None:
    for target in dict(TARGETS.items()).values():
        assert target.passes <= set(TARGET_PASSES)
    for name, run_pass in TARGET_PASSES.items():
        assert "; return" in (inspect.getdoc(run_pass) or "").splitlines()[0]
        (line,) = describe_passes({name: 3})
        assert line.startswith(f"{name} (3): ")
        assert len(line) > len(name) + 20


def test_a_target_without_passes_changes_nothing() -> None:
    result, counts = tuned(model(RESIDUAL, **NORM), "portable")
    assert counts == {}
    assert ops(result) == ["Add", "LayerNormalization"]


def test_a_residual_is_kept_apart_from_its_normalization() -> None:
    source = model(RESIDUAL, **NORM)
    result, counts = same(source, {"x": normal(5, 8), "r": normal(5, 8, seed=2)}, tolerance=1e-5)
    assert counts == {"keep_sums_apart": 1}
    assert ops(result) == ["Add", "LayerNormalization"]
    assert [list(t.dims) for t in result.graph.initializer] == [[1, 8], [1, 8]]


def test_the_runtime_does_not_fuse_what_is_kept_apart() -> None:
    # When the last line fails, ONNX Runtime fuses no longer, and the pass may go.
    source = model(RESIDUAL.replace("[N,8]", "[N,5,8]"), **NORM)
    result, _ = same(source, {"x": normal(2, 5, 8), "r": normal(2, 5, 8, seed=2)}, tolerance=1e-5)
    assert [node.op_type for node in ort.optimize(graph.from_proto(result)).node] == ["Add", "LayerNormalization"]
    assert [node.op_type for node in ort.optimize(graph.from_proto(source)).node] == ["SkipLayerNormalization"]


@pytest.mark.parametrize(
    "body",
    [
        "g (float[N,8] x) => (float[N,8] y) { s = Add(x, b) y = LayerNormalization<axis=-1>(s, g, b) }",
        "g (float[N,8] x, float[N,8] r) => (float[N,8] y, float[N,8] s) "
        "{ s = Add(x, r) y = LayerNormalization<axis=-1>(s, g, b) }",
        "g (float[N,8] x, float[N,8] r) => (float[N,8] y) "
        "{ s = Add(x, r) n = LayerNormalization<axis=-1>(s, g, b) y = Mul(n, s) }",
        "g (float[N,8] x) => (float[N,8] y) { y = LayerNormalization<axis=-1>(x, g, b) }",
    ],
    ids=["bias", "output", "two readers", "no sum"],
)
def test_other_sums_stay(body: str) -> None:
    assert tuned(model(body, **NORM))[1] == {}


def masked_batches(masks: float) -> list[dict[str, Array]]:
    """Scores around 0, sharp ones, and rows without an unmasked score."""
    mask = np.zeros((2, 1, 9, 9), np.float32)
    mask[..., 5:] = masks
    whole = np.full_like(mask, masks)
    return [
        {"s": normal(2, 3, 9, 9), "m": mask},
        {"s": 200 * normal(2, 3, 9, 9), "m": mask},
        {"s": normal(2, 3, 9, 9), "m": whole},
        {"s": normal(2, 3, 9, 9), "m": np.zeros_like(mask)},
    ]


@pytest.mark.parametrize("masks", [np.finfo(np.float32).min, -10000.0, -np.inf])
def test_a_masked_softmax_gets_a_floor_and_the_same_result(masks: float) -> None:
    source = model(MASKED)
    with np.errstate(all="ignore"):
        for batch in masked_batches(masks):
            result, counts = same(source, batch)
            assert counts == {"floor_masked_softmax": 1}
            assert ops(result) == ["Add", "ReduceMax", "Sub", "Max", "Softmax"]


def test_what_is_masked_becomes_a_normal_number() -> None:
    source = model(MASKED)
    batch = masked_batches(np.finfo(np.float32).min)[0]
    result, _ = tuned(source)
    (probabilities,) = run(result, batch)
    assert probabilities.min() > np.finfo(np.float32).tiny
    assert probabilities[..., 5:].max() <= np.exp(-FLOOR)


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_the_floor_is_written_for_every_opset(opset: int) -> None:
    source = model(MASKED, opset=opset, ir=8)
    assert same(source, masked_batches(-1e4)[0])[1] == {"floor_masked_softmax": 1}


@pytest.mark.parametrize(
    ("steps", "masked"),
    [
        ("x = Where(c, t, low)", True),
        ("f = Cast<to=1>(c) i = Sub(one, f) m = Mul(i, low) x = Add(t, m)", True),
        ("m = Where(c, zero, low) x = Add(m, t)", True),
        ("f = Cast<to=1>(c) x = Add(t, f)", False),
        ("x = Mul(t, one)", False),
        ("x = Add(t, one)", False),
    ],
)
def test_masks_are_found_where_exporters_write_them(steps: str, masked: bool) -> None:
    signature = "g (float[2,3,9,9] s, bool[2,1,9,9] c) => (float[2,3,9,9] y)"
    body = f"{signature} {{ t = MatMul(s, s) {steps} y = Softmax<axis=-1>(x) }}"
    held = {"low": np.array(-1e4, np.float32), "one": np.array(1, np.float32), "zero": np.array(0, np.float32)}
    source = model(body, **{name: array for name, array in held.items() if name in steps.replace("(", " ")})
    choice = normal(2, 1, 9, 9) > 0
    _, counts = same(source, {"s": normal(2, 3, 9, 9), "c": choice})
    assert counts == ({"floor_masked_softmax": 1} if masked else {})


def test_a_softmax_over_another_axis_stays() -> None:
    assert tuned(model(MASKED.replace("axis=-1", "axis=1")))[1] == {}


def test_bodies_are_tuned_too() -> None:
    body = """g (bool c, float[2,8] x, float[2,8] r) => (float[2,8] y) {
      y = If(c)<then_branch = a () => (float[2,8] u) { s = Add(x, r) u = LayerNormalization<axis=-1>(s, g, b) },
                else_branch = z () => (float[2,8] v) { v = Identity(x) }>
    }"""
    source = model(body, **NORM)
    batch = {"c": np.array(True), "x": normal(2, 8), "r": normal(2, 8, seed=3)}
    assert same(source, batch, tolerance=1e-5)[1] == {"keep_sums_apart": 1}


def test_a_quantized_model_is_tuned_and_says_so() -> None:
    body = """g (float[2,4,8] x) => (float[2,4,8] y) {
      p = MatMul(x, w)
      s = Add(p, x)
      y = LayerNormalization<axis=-1>(s, g, b)
    }"""
    source = model(body, w=normal(8, 8, seed=4), **NORM)
    found = quantize(source, target="ort-cpu")
    assert found.result.passes == {"keep_sums_apart": 1}
    assert quantize(source, target="portable").result.passes == {}


@pytest.mark.parametrize("added", ["Add(p, b)", "Add(b, p)", "Add(p, x)"])
def test_products_of_matrices_stay_integer_whatever_is_added(added: str) -> None:
    source = model(
        f"g (float[N,8] x) => (float[N,8] y) {{ p = MatMul(x, w)  s = {added}  y = Tanh(s) }}",
        w=normal(8, 8),
        b=normal(8),
    )
    batch = {"x": normal(16, 8)}
    found = quantize(source, [batch])
    assert found.result.passes == {"sum_behind_products": 1}
    kinds = [node.op_type for node in ort.optimize(graph.from_proto(found.proto)).node]
    assert kinds == ["QuantizeLinear", "MatMulIntegerToFloat", "Sum", "Tanh"]
    np.testing.assert_allclose(run(found.proto, batch)[0], run(found.proto, batch, exact=False)[0], atol=1e-5)


def test_only_integer_products_of_matrices_get_a_sum() -> None:
    """ONNX Runtime fuses no others, and a float product and its bias are faster as one Gemm."""
    weights = {"w": normal(8, 8), "b": normal(8)}
    text = "g (float[{shape}] x) => (float[{shape}] y) {{ p = MatMul(x, w)  y = Add(p, b) }}"
    batch = {"x": normal(2, 16, 8)}
    assert quantize(model(text.format(shape="N,T,8"), **weights), [batch]).result.passes == {}
    found = quantize(model(text.format(shape="N,8"), **weights), [{"x": normal(16, 8)}], scheme="w8")
    assert found.result.passes == {}
