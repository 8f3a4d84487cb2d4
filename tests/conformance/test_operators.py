"""One operator at a time: calibrated, quantized, checked and validated, for every target.

On ONNX Runtime's CPU provider the optimized graph is looked at too: what the plan quantizes has to run on codes there.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from qpipe.pipeline.calibration import Calibration
from qpipe.pipeline.session import SessionExtras, make_session
from qpipe.pipeline.targets import TARGETS
from quantizing import FINE, calibrate, error, model, normal, quantize, random_batches, run, signature
from validating import validated

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """An operator in a small net.

    Attributes:
        name: Of the case.
        body: The operator, from ``h`` to ``z``, or the whole graph when it has a ``{``.
        runs: Operator on codes in ONNX Runtime's optimized graph; empty where float stays on the CPU.
        weights: Constants by name.
    """

    name: str
    body: str
    runs: str = ""
    weights: dict[str, Array] = field(default_factory=dict)

    def model(self) -> onnx.ModelProto:
        if "{" in self.body:
            domains = '"com.microsoft" : 1' if "com.microsoft" in self.body else ""
            return model(self.body, domains=domains, **self.weights)
        # The operator stands between two convolutions, so that codes come in and are asked for behind it.
        text = f"g (float[2,4,6,6] x) => (float[2,4,H,W] y) {{ h = Conv(x, w)  {self.body}  y = Conv(z, v) }}"
        return model(text, w=normal(4, 4, 1, 1), v=normal(4, 4, 1, 1, seed=1), **self.weights)


def whole(*values: int) -> Array:
    return np.asarray(values, np.int64)


def real(*values: float) -> Array:
    return np.asarray(values, np.float32)


def product(name: str, signature: str, runs: str, **weights: Array) -> Case:
    return Case(name, f"g {signature}", runs, weights)


CASES = [
    product(
        "Conv 1-D",
        "(float[2,4,9] x) => (float[2,6,7] y) { y = Conv(x, w, b) }",
        "QLinearConv",
        w=normal(6, 4, 3),
        b=normal(6),
    ),
    product(
        "Conv 2-D",
        "(float[2,4,6,6] x) => (float[2,6,4,4] y) { y = Conv(x, w, b) }",
        "QLinearConv",
        w=normal(6, 4, 3, 3),
        b=normal(6),
    ),
    product(
        "Conv 3-D",
        "(float[2,4,5,5,5] x) => (float[2,6,3,3,3] y) { y = Conv(x, w) }",
        "QLinearConv",
        w=normal(6, 4, 3, 3, 3),
    ),
    product(
        "Conv depthwise",
        "(float[2,4,6,6] x) => (float[2,4,4,4] y) { y = Conv<group=4>(x, w, b) }",
        "QLinearConv",
        w=normal(4, 1, 3, 3),
        b=normal(4),
    ),
    product(
        "Conv grouped",
        "(float[2,4,6,6] x) => (float[2,6,4,4] y) { y = Conv<group=2>(x, w) }",
        "QLinearConv",
        w=normal(6, 2, 3, 3),
    ),
    product(
        "Conv dilated",
        "(float[2,4,8,8] x) => (float[2,6,2,2] y) { y = Conv<dilations=[2,2], strides=[2,2]>(x, w) }",
        "QLinearConv",
        w=normal(6, 4, 3, 3),
    ),
    product(
        "ConvTranspose",
        "(float[2,4,6,6] x) => (float[2,3,8,8] y) { y = ConvTranspose(x, w, b) }",
        "",
        w=normal(4, 3, 3, 3),
        b=normal(3),
    ),
    product(
        "ConvTranspose grouped",
        "(float[2,4,6,6] x) => (float[2,6,8,8] y) { y = ConvTranspose<group=2>(x, w, b) }",
        "",
        w=normal(4, 3, 3, 3),
        b=normal(6),
    ),
    product("Gemm", "(float[5,8] x) => (float[5,6] y) { y = Gemm(x, w, b) }", "QGemm", w=normal(8, 6), b=normal(6)),
    product(
        "Gemm transB",
        "(float[5,8] x) => (float[5,6] y) { y = Gemm<transB=1>(x, w, b) }",
        "QGemm",
        w=normal(6, 8),
        b=normal(6),
    ),
    product("Gemm transA", "(float[8,5] x) => (float[5,6] y) { y = Gemm<transA=1>(x, w) }", "QGemm", w=normal(8, 6)),
    product(
        "MatMul", "(float[2,5,8] x) => (float[2,5,6] y) { y = MatMul(x, w) }", "MatMulIntegerToFloat", w=normal(8, 6)
    ),
    product(
        "MatMul transposed weight",
        "(float[5,8] x) => (float[5,6] y) { t = Transpose(w)  y = MatMul(x, t) }",
        "MatMulIntegerToFloat",
        w=normal(6, 8),
    ),
    product(
        "MatMul stack of weights",
        "(float[3,5,8] x) => (float[3,5,6] y) { y = MatMul(x, w) }",
        "MatMulIntegerToFloat",
        w=normal(3, 8, 6),
    ),
    product(
        "MatMul vector", "(float[5,8] x) => (float[5] y) { y = MatMul(x, w) }", "MatMulIntegerToFloat", w=normal(8)
    ),
    product(
        "MatMul left weight",
        "(float[8,5] x) => (float[6,5] y) { y = MatMul(w, x) }",
        "MatMulIntegerToFloat",
        w=normal(6, 8),
    ),
    product(
        "Einsum",
        '(float[2,5,8] x) => (float[2,5,2,3] y) { y = Einsum<equation="bsd,dhe->bshe">(x, w) }',
        "MatMulIntegerToFloat",
        w=normal(8, 2, 3),
    ),
    product(
        "BatchNormalization",
        "(float[2,4,6,6] x) => (float[2,6,4,4] y) { c = Conv(x, w)  y = BatchNormalization(c, s, s, s, s) }",
        "QLinearConv",
        w=normal(6, 4, 3, 3),
        s=np.abs(normal(6)) + 0.1,
    ),
    Case("Relu", "z = Relu(h)", "QLinearConv"),
    Case(
        "Clip",
        "z = Clip(h, lo, hi)",
        "QLinearConv",
        {"lo": np.asarray(-1, np.float32), "hi": np.asarray(1, np.float32)},
    ),
    Case("Add", "t = Relu(h)  u = Conv(t, v)  z = Add(t, u)", "QLinearAdd"),
    Case("Add constant", "z = Add(h, k)", "QLinearAdd", {"k": normal(4, 1, 1)}),
    Case("Mul broadcast", "u = GlobalAveragePool(h)  z = Mul(h, u)", "QLinearMul"),
    Case("Mul constant", "z = Mul(k, h)", "QLinearMul", {"k": np.asarray(0.5, np.float32)}),
    Case("Sigmoid gate", "u = Sigmoid(h)  z = Mul(h, u)", "QLinearSigmoid"),
    Case("LeakyRelu", "z = LeakyRelu<alpha=0.1>(h)", "QLinearLeakyRelu"),
    Case("AveragePool", "z = AveragePool<kernel_shape=[2,2]>(h)", "QLinearAveragePool"),
    Case("GlobalAveragePool", "z = GlobalAveragePool(h)", "QLinearGlobalAveragePool"),
    Case("MaxPool", "z = MaxPool<kernel_shape=[2,2], strides=[2,2]>(h)", "MaxPool"),
    Case("Relu behind Concat", "t = Concat<axis=3>(h, h)  z = Relu(t)", "QLinearConv"),
    Case("Concat codes", "z = Concat<axis=3>(h, h)", "QLinearConcat"),
    Case("Concat constant", "z = Concat<axis=2>(h, k)", "QLinearConcat", {"k": normal(2, 4, 1, 6)}),
    Case("Split", "a, b = Split<axis=2, num_outputs=2>(h)  z = Concat<axis=2>(b, a)", "Split"),
    Case("Reshape", "z = Reshape(h, s)", "Reshape", {"s": whole(2, 4, 9, 4)}),
    Case("Transpose", "z = Transpose<perm=[0,1,3,2]>(h)", "Transpose"),
    Case(
        "Flatten Unsqueeze",
        "f = Flatten<axis=2>(h)  u = Unsqueeze(f, a)  z = Reshape(u, s)",
        "Unsqueeze",
        {"a": whole(0), "s": whole(2, 4, 6, 6)},
    ),
    Case("Squeeze", "u = Reshape(h, s)  z = Squeeze(u, a)", "Squeeze", {"s": whole(2, 4, 6, 6, 1), "a": whole(4)}),
    Case("Slice", "z = Slice(h, a, b, c)", "Slice", {"a": whole(1), "b": whole(5), "c": whole(2)}),
    Case(
        "Expand",
        "u = ReduceMax<keepdims=1>(h, a)  z = Expand(u, s)",
        "Expand",
        {"a": whole(2, 3), "s": whole(2, 4, 3, 3)},
    ),
    Case("Tile", "z = Tile(h, r)", "Tile", {"r": whole(1, 1, 2, 1)}),
    Case("Gather", "z = Gather<axis=2>(h, i)", "Gather", {"i": whole(0, 3, 3)}),
    Case(
        "GatherElements", "z = GatherElements<axis=3>(h, i)", "GatherElements", {"i": np.ones((2, 4, 6, 3), np.int64)}
    ),
    Case("Where", "t = Relu(h)  u = Conv(t, v)  z = Where(m, t, u)", "QLinearWhere", {"m": np.arange(6) % 2 == 0}),
    Case(
        "DepthToSpace", "e = Conv(h, wd)  z = DepthToSpace<blocksize=2>(e)", "DepthToSpace", {"wd": normal(16, 4, 1, 1)}
    ),
    Case("SpaceToDepth", "s = SpaceToDepth<blocksize=2>(h)  z = Conv(s, ws)", "", {"ws": normal(4, 16, 1, 1)}),
    Case("Resize nearest", 'z = Resize<mode="nearest">(h, , s)', "Resize", {"s": real(1, 1, 2, 2)}),
    Case("Resize linear", 'z = Resize<mode="linear">(h, , s)', "", {"s": real(1, 1, 2, 2)}),
    Case("Pad", "z = Pad(h, p)", "", {"p": whole(0, 0, 1, 1, 0, 0, 1, 1)}),
    Case("ReduceMin", "z = ReduceMin<keepdims=1>(h, a)", "ReduceMin", {"a": whole(3)}),
    Case("TopK", "z, i = TopK<axis=3>(h, k)", "", {"k": whole(3)}),
    Case("Softmax", "z = Softmax<axis=1>(h)"),
    Case("LayerNormalization", "z = LayerNormalization(h, g)", "", {"g": normal(6)}),
    Case("InstanceNormalization", "z = InstanceNormalization(h, g, g)", "", {"g": normal(4)}),
    Case("CumSum", "z = CumSum(h, a)", "", {"a": np.asarray(3)}),
    Case("Tanh", "z = Tanh(h)"),
    product(
        "LSTM",
        "(float[5,2,6] x) => (float[5,1,2,4] y) { y, h, c = LSTM<hidden_size=4>(x, w, r, b) }",
        "",
        w=normal(1, 16, 6) / 3,
        r=normal(1, 16, 4) / 3,
        b=normal(1, 32) / 3,
    ),
    product(
        "GRU",
        "(float[5,2,6] x) => (float[1,2,4] y) { h, y = GRU<hidden_size=4>(x, w, r) }",
        "",
        w=normal(1, 12, 6) / 3,
        r=normal(1, 12, 4) / 3,
    ),
    product(
        "ArgMax",
        "(float[2,4,6,6] x) => (float[2,4,6,6] y, int64[2,1,6,6] p) { y = Conv(x, w)  p = ArgMax<axis=1>(x) }",
        "QLinearConv",
        w=normal(4, 4, 1, 1),
    ),
    product(
        "Attention of ONNX Runtime",
        "(float[2,5,8] x) => (float[2,5,8] y) { y = com.microsoft.Attention<num_heads=2>(x, w, b) }",
        "MatMulIntegerToFloat",
        w=normal(8, 24) / 3,
        b=normal(24) / 3,
    ),
    product(
        "EmbedLayerNormalization",
        """(int32[2,5] ids) => (float[2,5,6] y) {
            e, m = com.microsoft.EmbedLayerNormalization(ids, , words, places, , g, b)  y = MatMul(e, w)
        }""",
        "MatMulIntegerToFloat",
        words=normal(9, 8),
        places=normal(5, 8),
        g=normal(8),
        b=normal(8),
        w=normal(8, 6),
    ),
    product(
        "EmbeddingBag",
        """(int64[3,4] ids) => (float[3,6] y) {
            rows = Gather(table, ids)  sum = ReduceSum<keepdims=0>(rows, axis)  y = MatMul(sum, w)
        }""",
        "MatMulIntegerToFloat",
        table=normal(9, 8),
        axis=whole(1),
        w=normal(8, 6),
    ),
]


@functools.cache
def calibrated(case: str) -> tuple[onnx.ModelProto, Calibration]:
    source = next(c for c in CASES if c.name == case).model()
    return source, calibrate(source, random_batches(source))


@pytest.mark.parametrize("target", TARGETS.names())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_operator_is_quantized_for_a_target(case: Case, target: str, tmp_path: Path) -> None:
    source, calibration = calibrated(case.name)
    found = quantize(source, calibration=calibration, target=target, method="minmax")
    assert signature(found.proto) == signature(source)
    if all(op in TARGETS.get(target).kernels for op in ("Conv", "Gemm", "MatMul")):
        kept = [d for d in found.plan.nodes().values() if d.spec is None and d.op in ("Conv", "Gemm", "MatMul")]
        assert kept == []
    validated(found, random_batches(source), tmp_path, min_sqnr_db=20)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_operator_equals_the_float_one_where_scales_are_fine(case: Case) -> None:
    source, calibration = calibrated(case.name)
    found = quantize(source, calibration=calibration, **FINE)
    assert max(error(found, batch) for batch in random_batches(source)) < 1e-3


@pytest.mark.parametrize("case", [case for case in CASES if case.runs], ids=lambda case: case.name)
def test_onnxruntime_runs_it_on_codes(case: Case, tmp_path: Path) -> None:
    source, calibration = calibrated(case.name)
    found = quantize(source, calibration=calibration, target="ort-cpu")
    path = tmp_path / "optimized.onnx"
    make_session(found.proto, extras=SessionExtras(optimized_model=path))
    ops = [node.op_type for node in onnx.load(path).graph.node]
    assert any(case.runs in op for op in ops), "NhwcMaxPool is a MaxPool"
    assert not {"Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm"} & set(ops)
    # A Clip or Relu that does not cut where the codes end is a float island; what is multiplied never is.
    assert ops.count("QuantizeLinear") <= (2 if case.name in ("Clip", "Where", "Relu behind Concat") else 1)
    for batch in random_batches(source, 1):
        run(found.proto, batch, exact=False)


def test_tables_inside_a_fused_operator_stay_and_say_so() -> None:
    source, calibration = calibrated("EmbedLayerNormalization")
    found = quantize(source, calibration=calibration, weights={"embeddings": True})
    assert "tables of embeddings" in found.reason("EmbedLayerNormalization_0")
