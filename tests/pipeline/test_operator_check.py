"""Validation compares the plugin's kernel, the function body and the numpy reference of qpipe's operator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from outlying import LOUD, loud_batches, outlier
from qpipe.pipeline import graph
from qpipe.pipeline.operator_check import BODY, PLUGIN, OperatorRow, compare_operators, operator_notes
from qpipe.pipeline.report import to_text
from qpipe.pipeline.session import plugin_status
from qpipe.pipeline.stages.validate import ValidateOptions, validate
from qpipe.plugins.outlier_matmul import op as contract
from quantizing import model, normal, quantize, random_batches

CHAIN = """g (float[N,T,96] x) => (float[N,T,40] y) {
    a = MatMul(x, w)  b = Relu(a)  c = MatMul(b, v)  y = Add(c, bias)
}"""
AS_BUILT = [PLUGIN, BODY] if plugin_status() == "registered" else [BODY]


@pytest.fixture(scope="module")
def pair() -> tuple[onnx.ModelProto, onnx.ModelProto]:
    proto = model(CHAIN, w=normal(96, 80) * 0.1, v=normal(80, 40) * 0.1, bias=normal(40))
    return proto, outlier(proto, loud_batches()).proto


def test_all_makings_agree_on_every_node(pair: tuple[onnx.ModelProto, onnx.ModelProto]) -> None:
    rows = compare_operators(graph.from_proto(pair[1]), loud_batches())
    assert len(rows) == 2
    for row in rows:
        assert list(row.differences) == AS_BUILT
        assert row.agrees()
        assert 0 < max(row.differences.values()) < 1e-5, "float32 in another order is never quite the same"
    assert list(operator_notes(rows)) == []


def test_new_outliers_are_counted_and_said(pair: tuple[onnx.ModelProto, onnx.ModelProto]) -> None:
    batches = loud_batches()
    batches[1]["x"][0, 0, 60] = 400.0
    rows = compare_operators(graph.from_proto(pair[1]), batches)
    assert rows[0].new_outliers == 1
    assert all(row.agrees() for row in rows)
    assert any("new outliers" in note for note in operator_notes(rows))


def test_a_body_that_computes_something_else_is_found(pair: tuple[onnx.ModelProto, onnx.ModelProto]) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(pair[1])
    nodes = broken.functions[0].node
    next(node for node in nodes if node.output[0] == "without_bias").op_type = "Sub"
    rows = compare_operators(graph.from_proto(broken), loud_batches())
    assert [row.differences[BODY] > 0.01 for row in rows] == [True, True]
    assert all(row.differences[PLUGIN] < 1e-5 for row in rows if PLUGIN in row.differences)
    assert "disagree" in next(iter(operator_notes(rows)))


def test_values_that_are_not_finite_must_be_so_everywhere() -> None:
    assert not OperatorRow(node="n", dtype="float32", differences={PLUGIN: float("inf")}).agrees()
    assert not OperatorRow(node="n", dtype="float32", differences={PLUGIN: float("nan")}).agrees()


def test_half_precision() -> None:
    body = "g (float16[N,96] x) => (float16[N,80] y) { y = MatMul(x, w) }"
    proto = model(body, w=(normal(96, 80) * 0.1).astype(np.float16))
    batches = [{"x": batch["x"][0].astype(np.float16)} for batch in loud_batches()]
    rows = compare_operators(graph.from_proto(outlier(proto, batches).proto), batches)
    assert [list(row.differences) for row in rows] == [AS_BUILT]
    assert rows[0].agrees()


def test_bfloat16() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((80, 96)).astype(np.float32)
    packed = contract.pack(w, LOUD, contract.X_TYPES[2])
    body = """g (float[N,96] x) => (float[N,80] y) {
        h = Cast<to = 16>(x)  z, met = qpipe.OutlierMatMul(h, q, s, i, o)  y = Cast<to = 1>(z)
    }"""
    proto = model(body, domains='"qpipe" : 1', **dict(zip("qsio", packed.inputs().values(), strict=True)))
    proto.functions.append(contract.function_proto(opset=21, dynamic=False))
    batches = [{"x": batch["x"][0]} for batch in loud_batches()]
    (row,) = compare_operators(graph.from_proto(proto), batches)
    assert row.dtype == "bfloat16"
    assert list(row.differences) == AS_BUILT
    assert row.agrees()
    assert row.elements == sum(batch["x"].size for batch in batches)


BODIES = {
    "If": """g (float[N,96] x, bool c) => (float[N,40] y) {
        y = If (c) <then_branch = t () => (float[N,40] a) { p = MatMul(x, w)  q = Relu(p)  a = MatMul(q, v) },
                    else_branch = e () => (float[N,40] b) { b = MatMul(x, u) }>
    }""",
    "Loop": """g (float[N,96] x) => (float[N,96] y) {
        three = Constant<value = int64 {3}>()
        y = Loop (three, , x) <body = l (int64 i, bool on, float[N,96] h) => (bool go, float[N,96] z)
            { go = Identity(on)  p = Tanh(h)  m = MatMul(p, w)  n = MatMul(x, u)  k = Concat<axis = 1>(m, n)
              z = MatMul(k, r) }>
    }""",
    "Scan": """g (float[3,5,96] x, float[5,96] f) => (float[3,5,40] y) {
        y = Scan <num_scan_inputs = 1, body = s (float[5,96] h) => (float[5,40] z)
            { p = Tanh(h)  m = MatMul(p, u)  n = MatMul(f, t)  z = Add(m, n) }> (x)
    }""",
}
SHAPES = {"w": (96, 80), "v": (80, 40), "u": (96, 40), "t": (96, 40), "r": (120, 96)}


def in_body(kind: str) -> onnx.ModelProto:
    return model(BODIES[kind], **{n: normal(*s) * 0.1 for n, s in SHAPES.items() if f", {n})" in BODIES[kind]})


def batches_of(proto: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    """Batches in which every second condition is true."""
    batches = random_batches(proto, 3)
    for index, batch in enumerate(batches):
        batch.update({"c": np.array(index % 2 == 0)} if "c" in batch else {})
    return batches


@pytest.mark.parametrize(("kind", "count"), [("If", 3), ("Loop", 3), ("Scan", 2)])
def test_nodes_in_bodies_are_compared(kind: str, count: int) -> None:
    proto = in_body(kind)
    done = quantize(proto, scheme="w8a8-vector", outliers={"min_inputs": 64})
    assert "OutlierMatMul" not in done.ops(), "only inside bodies"
    rows = compare_operators(graph.from_proto(done.proto), batches_of(proto))
    assert len(rows) == count
    for row in rows:
        assert row.unseen == ""
        assert list(row.differences) == AS_BUILT
        assert 0 < max(row.differences.values()) < 1e-5
        assert row.elements > 0
    assert list(operator_notes(rows)) == []


def test_a_branch_that_was_not_taken_has_nothing_to_compare() -> None:
    proto = in_body("If")
    done = quantize(proto, scheme="w8a8-vector", outliers={"min_inputs": 64})
    rows = compare_operators(graph.from_proto(done.proto), batches_of(proto)[:1])
    assert sorted(row.elements > 0 for row in rows) == [False, True, True]
    assert [row.differences == {} for row in rows] == [row.elements == 0 for row in rows]


def test_a_model_without_the_operator_costs_nothing(pair: tuple[onnx.ModelProto, onnx.ModelProto]) -> None:
    assert compare_operators(graph.from_proto(pair[0]), loud_batches()) == []


def test_the_report_shows_it(pair: tuple[onnx.ModelProto, onnx.ModelProto], tmp_path: Path) -> None:
    for name, proto in zip(("float.onnx", "int8.onnx"), pair, strict=True):
        onnx.save(proto, tmp_path / name)
    batches = loud_batches()
    report = validate(tmp_path / "float.onnx", tmp_path / "int8.onnx", iter(batches), ValidateOptions(rounds=0))
    rows = report.table("operators").rows
    assert [row["node"] for row in rows] == [
        node.name for node in pair[1].graph.node if node.op_type == "OutlierMatMul"
    ]
    assert "difference from the numpy reference" in to_text(report)
