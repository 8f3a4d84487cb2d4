"""Tensors inside bodies of If, Loop and Scan are collected."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator
from qpipe.calibrate.stats.histogram import Histogram
from qpipe.pipeline.calibration.expose import expose
from qpipe.pipeline.stages.collect import collect

IF = """
<ir_version: 8, opset_import: ["": 17]>
g (float[N] x, bool c) => (float[M] y)
{
    y = If (c) <
        then_branch = t () => (float[M] p) { a = Relu (x)  p = Mul (a, a) },
        else_branch = e () => (float[M] q) { b = Neg (x)  q = Sub (b, x) }
    >
}
"""

LOOP = """
<ir_version: 8, opset_import: ["": 17]>
g (float[N] x, int64 n, bool c) => (float[N] z)
{
    z = Loop (n, c, x) <
        body = b (int64 i, bool ci, float[N] v) => (bool co, float[N] vo) {
            co = Identity (ci)
            w = Add (v, v)
            vo = If (c) <
                then_branch = t () => (float[N] p) { a = Relu (w)  p = Mul (a, a) },
                else_branch = e () => (float[N] q) { b = Neg (w)  q = Sub (b, w) }
            >
        }
    >
}
"""

SCAN = """
<ir_version: 8, opset_import: ["": 17]>
g (float[N] s, float[T, N] xs) => (float[N] last, float[T, N] ys)
{
    last, ys = Scan <num_scan_inputs = 1, body = b (float[N] state, float[N] x) => (float[N] next, float[N] y) {
        m = Mul (state, x)
        next = Add (state, m)
        y = Sub (m, x)
    }> (s, xs)
}
"""

X = np.array([1.5, -2.0, 3.0], np.float32)


def histograms(model: onnx.ModelProto, names: list[str], batch: dict[str, np.ndarray]) -> dict[str, Histogram]:
    found = collect(model, names, [batch])
    assert found.not_covered == {}
    return {name: stats.histogram for name, stats in found.tensors.items()}


@pytest.mark.parametrize("choice", [True, False])
def test_only_the_branch_that_runs_is_counted(choice):
    found = histograms(parser.parse_model(IF), ["a", "b", "y"], {"x": X, "c": np.array(choice)})
    assert found["a"] == (Histogram.of(np.maximum(X, 0)) if choice else Histogram.empty())
    assert found["b"] == (Histogram.empty() if choice else Histogram.of(-X))


def test_every_iteration_of_a_loop_is_counted_also_in_a_branch_inside():
    batch = {"x": X, "n": np.array(3), "c": np.array(True)}
    found = histograms(parser.parse_model(LOOP), ["w", "a", "b", "z"], batch)
    value, doubled, positive = X, [], []
    for _ in range(3):
        doubled.append(value + value)
        positive.append(np.maximum(doubled[-1], 0))
        value = positive[-1] ** 2
    assert found["w"] == Histogram.of(np.concatenate(doubled))
    assert found["a"] == Histogram.of(np.concatenate(positive))
    assert found["b"] == Histogram.empty()
    assert found["z"] == Histogram.of(value)


def test_every_step_of_a_scan_is_counted():
    steps = np.random.default_rng(0).integers(-2, 3, (4, 3)).astype(np.float32)
    found = histograms(parser.parse_model(SCAN), ["m", "ys"], {"s": X, "xs": steps})
    state, products = X, []
    for step in steps:
        products.append(state * step)
        state = state + products[-1]
    assert found["m"] == Histogram.of(np.concatenate(products))


def test_loop_iterations_may_differ_in_size():
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[N] x, int64 n, bool c) => (float[M] z)
        { z = Loop (n, c, x) <body = b (int64 i, bool ci, float[K] v) => (bool co, float[L] vo) {
            co = Identity (ci)  h = Abs (v)  vo = Concat <axis = 0> (h, h) }> }
    """)
    batch = {"x": X, "n": np.array(3), "c": np.array(True)}
    assert histograms(model, ["h"], batch)["h"].total == 3 + 6 + 12


@pytest.mark.parametrize(("text", "inner"), [(IF, ["a", "b"]), (LOOP, ["w", "a"]), (SCAN, ["m"])])
def test_an_exposed_model_is_valid_and_computes_the_same(text, inner):
    original, exposed = parser.parse_model(text), parser.parse_model(text)
    added = expose(exposed, inner)
    types = {
        name: onnx.helper.make_tensor_value_info(name, 1, ["K"] if tensor in added.lifted else ["R", "K"])
        for tensor, name in added.outputs.items()
    }
    for entry in exposed.graph.output:
        if entry.name in types:
            entry.CopyFrom(types[entry.name])
    onnx.checker.check_model(exposed)
    batch = {"x": X, "c": np.array(True), "n": np.array(2), "s": X, "xs": np.stack([X, X])}
    feed = {entry.name: batch[entry.name] for entry in original.graph.input}
    names = [entry.name for entry in original.graph.output]
    for one, other in zip(
        ReferenceEvaluator(original).run(names, feed), ReferenceEvaluator(exposed).run(names, feed), strict=True
    ):
        assert np.array_equal(one, other)


def test_a_name_in_both_branches_is_ambiguous():
    model = parser.parse_model(IF.replace("b = Neg (x)  q = Sub (b, x)", "a = Neg (x)  q = Sub (a, x)"))
    found = collect(model, ["a"], [{"x": X, "c": np.array(True)}])
    assert "several bodies" in found.not_covered["a"]
