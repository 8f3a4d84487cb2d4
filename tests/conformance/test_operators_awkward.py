"""Larger awkward models: they come out valid, quantized wherever a rule applies, or with a reason per node."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from qpipe.calibrate.stats.histogram import Histogram
from qpipe.pipeline import graph
from qpipe.pipeline.calibration import Calibration, TensorStats
from qpipe.pipeline.stages.prepare import prepare
from qpipe.pipeline.stages.upgrade import upgrade
from qpipe.pipeline.targets import TARGETS
from quantizing import Result, error, model, normal, quantize, random_batches, run, signature
from validating import validated

Model = tuple[onnx.ModelProto, list[dict[str, Any]]]


def residual_net_of_old_opset() -> Model:
    """Opset 9, IR 3: weights are inputs, Upsample, BatchNormalization, attributes that became inputs."""
    body = """g (float[1,3,8,8] x) => (float[1,5] y) {
        c = Conv<pads=[1,1,1,1]>(x, w)  n = BatchNormalization(c, s, s, s, s)  r = Relu(n)
        d = Conv<pads=[1,1,1,1]>(r, v)  a = Add(r, d)  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)
        u = Upsample<mode="nearest">(m, scales)  g = GlobalAveragePool(u)  f = Flatten(g)  l = Gemm(f, wg, bg)
        p = Softmax<axis=1>(l)  y = Clip<min=0.0, max=1.0>(p)
    }"""
    weights = {"w": normal(4, 3, 3, 3), "v": normal(4, 4, 3, 3), "wg": normal(4, 5), "bg": normal(5)}
    extra = {"s": np.abs(normal(4)) + 0.1, "scales": np.float32([1, 1, 2, 2])}
    proto = model(body, opset=9, ir=3, **weights, **extra)
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    proto = graph.to_proto(upgrade(graph.from_proto(proto)))
    return proto, random_batches(proto)


def transformer_block() -> Model:
    """Attention as exporters write it: masks with sentinels, LayerNormalization, shapes computed at run time."""
    body = """g (float[B,S,8] x, int64[B,S] mask) => (float[B,S,8] y) {
        n = LayerNormalization(x, g8, b8)
        q = MatMul(n, wq)  k = MatMul(n, wk)  v = MatMul(n, wv)
        kt = Transpose<perm=[0,2,1]>(k)  s = MatMul(q, kt)  d = Div(s, root)
        m = Cast<to=1>(mask)  i = Sub(one, m)  j = Mul(i, lowest)  u = Unsqueeze(j, axis1)  t = Add(d, u)
        p = Softmax(t)  c = MatMul(p, v)  o = MatMul(c, wo)  ob = Add(o, b8)  r = Add(ob, x)
        n2 = LayerNormalization(r, g8, b8)  h = MatMul(n2, w1)  hb = Add(h, b32)
        e = Div(hb, sqrt2)  f = Erf(e)  f1 = Add(f, one)  ge = Mul(hb, f1)  gh = Mul(ge, half)
        l = MatMul(gh, w2)  y = Add(l, r)
    }"""
    names = {"wq": (8, 8), "wk": (8, 8), "wv": (8, 8), "wo": (8, 8), "w1": (8, 32), "w2": (32, 8)}
    weights = {name: normal(*shape, seed=i) / 3 for i, (name, shape) in enumerate(names.items())}
    scalars = {"one": 1.0, "root": 8**0.5, "lowest": -3.4e38, "sqrt2": 2**0.5, "half": 0.5}
    weights |= {name: np.asarray(value, np.float32) for name, value in scalars.items()}
    weights |= {"g8": normal(8), "b8": normal(8), "b32": normal(32), "axis1": np.array([1])}
    batches = [{"x": normal(2, length, 8), "mask": np.ones((2, length), np.int64)} for length in (3, 5)]
    batches[0]["mask"][:, 1:] = 0
    return model(body, opset=17, ir=8, **weights), batches


def recurrent_net() -> Model:
    """LSTM and GRU behind an embedding; the classifier is what can be quantized."""
    body = """g (int64[S,N] ids) => (float[N,3] y) {
        e = Gather(table, ids)
        a, h, c = LSTM<hidden_size=5>(e, wl, rl)
        s = Squeeze(a, axis1)  b, l = GRU<hidden_size=5>(s, wg, rg)
        f = Squeeze(l, axis0)  y = Gemm<transB=1>(f, wd, bd)
    }"""
    weights = {
        "table": normal(11, 4),
        "wl": normal(1, 20, 4),
        "rl": normal(1, 20, 5),
        "wg": normal(1, 15, 5),
        "rg": normal(1, 15, 5),
        "wd": normal(3, 5),
        "bd": normal(3),
    }
    axes = {"axis1": np.array([1]), "axis0": np.array([0])}
    return model(body, **weights, **axes), [{"ids": np.arange(6).reshape(3, 2)}]


def nested_bodies() -> Model:
    """A Loop inside an If inside the model, all with weights, reading tensors of every level."""
    body = """g (float[2,4] x, bool f, int64 n) => (float[2,4] y) {
        h = MatMul(x, w0)
        y = If(f)<
            then_branch = t () => (float[2,4] a) {
                k = MatMul(h, w1)  go = Identity(f)
                a = Loop(n, go, k)<body = b (int64 i, bool ci, float[2,4] s) => (bool co, float[2,4] o) {
                    co = Identity(ci)  r = Tanh(s)  p = MatMul(r, w2)  q = MatMul(h, w1)  o = Add(p, q)
                }>
            },
            else_branch = e () => (float[2,4] b) { u = MatMul(x, w1)  b = Relu(u) }
        >
    }"""
    weights = {f"w{i}": normal(4, 4, seed=i) / 2 for i in range(3)}
    batches = [{"x": normal(2, 4), "f": np.array(flag), "n": np.array(2)} for flag in (True, False)]
    return model(body, **weights), batches


def scan() -> Model:
    """The body of a Scan, its state carried from row to row."""
    body = """g (float[2,4] s, float[5,2,4] xs) => (float[2,4] last, float[5,2,4] ys) {
        last, ys = Scan<num_scan_inputs=1, body = b (float[2,4] a, float[2,4] x) => (float[2,4] c, float[2,4] y) {
            p = Tanh(a)  m = MatMul(p, w)  c = Add(m, x)  y = Identity(c)
        }>(s, xs)
    }"""
    return model(body, w=normal(4, 4) / 2), [{"s": normal(2, 4), "xs": normal(5, 2, 4)}]


def strange_names() -> Model:
    """Slashes, spaces, other scripts, escapes and ten thousand letters; nodes without names."""
    names = ["a/b c", "größe", "重み", "x" * 10_000, "\x1b]0;title\x07", "../../etc", "<script>"]
    nodes = []
    for index, name in enumerate(names):
        before = names[index - 1] if index else "in put"
        weight = f"{name}/weight"
        nodes.append(helper.make_node("MatMul", [before, weight], [name], name="" if index % 2 else f"node {name}"))
    weights = [numpy_helper.from_array(normal(4, 4, seed=i) / 2, f"{name}/weight") for i, name in enumerate(names)]
    inputs = [helper.make_tensor_value_info("in put", TensorProto.FLOAT, [2, 4])]
    outputs = [helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, [2, 4])]
    proto = helper.make_model(
        helper.make_graph(nodes, "g/ 名", inputs, outputs, weights),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    return proto, [{"in put": normal(2, 4)}]


def other_types() -> Model:
    """Strings, sequences, optionals and whole numbers around one product."""
    outputs = "float[2,4] y, string[2] t, int64[3] m, seq(float[2,4]) s"
    body = f"""g (float[2,4] x, string[2] text, int64[3] n) => ({outputs}) {{
        h = MatMul(x, w)  s = SequenceConstruct(h, x)  i = SequenceAt(s, zero)  y = Tanh(i)
        t = Identity(text)  m = Add(n, n)
    }}"""
    batch = {"x": normal(2, 4), "text": np.array(["a", "b"], object), "n": np.arange(3)}
    return model(body, w=normal(4, 4), zero=np.array(0)), [batch]


def every_embedding() -> Model:
    """Lookups by Gather, through a Transpose, by OneHot and a product, tied to the output, and by GatherElements."""
    body = """g (int64[N] ids, int64[2,3] places) => (float[N,9] y, float[2,3] z) {
        a = Gather(table, ids)  tt = Transpose<perm=[1,0]>(turned)  b = Gather(tt, ids)
        o = OneHot(ids, depth, values)  c = MatMul(o, table)
        ab = Add(a, b)  abc = Add(ab, c)  h = Tanh(abc)
        tied = Transpose<perm=[1,0]>(table)  y = MatMul(h, tied)
        z = GatherElements<axis=1>(small, places)
    }"""
    weights = {"table": normal(9, 4), "turned": normal(4, 9), "small": normal(2, 5)}
    shapes = {"depth": np.array(9), "values": np.float32([0, 1])}
    batch = {"ids": np.array([0, 8, 3]), "places": np.array([[0, 4, 2], [1, 1, 1]])}
    return model(body, **weights, **shapes), [batch]


def half_precision() -> Model:
    """A float16 model of opset 17, with a whole region of codes; its scales need opset 19."""
    body = """g (float16[1,3,8,8] x) => (float16[1,5] y) {
        c = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(c)  d = Conv<pads=[1,1,1,1]>(r, v)  a = Add(r, d)
        m = MaxPool<kernel_shape=[2,2]>(a)  g = GlobalAveragePool(m)  f = Flatten(g)  y = Gemm(f, wg, bg)
    }"""
    shapes = {"w": (4, 3, 3, 3), "b": (4,), "v": (4, 4, 3, 3), "wg": (4, 5), "bg": (5,)}
    weights = {name: normal(*shape, dtype=np.float16) for name, shape in shapes.items()}
    proto = model(body, opset=17, ir=8, **weights)
    return proto, random_batches(proto)


def shared_everything() -> Model:
    """One weight in four operators and three layouts, a bias that is also an output, an input read five times."""
    body = """g (float[N,4] x) => (float[N,4] y, float[4] b, float[4,4] w) {
        t = Transpose<perm=[1,0]>(w)  r = Reshape(w, flat)  rr = Reshape(r, square)
        m1 = MatMul(x, w)  m2 = MatMul(x, t)  g1 = Gemm(x, w, b)  g2 = Gemm<transB=1>(x, w, b)  m3 = MatMul(x, rr)
        a = Add(m1, m2)  c = Add(g1, g2)  d = Add(a, c)  y = Add(d, m3)
    }"""
    shapes = {"flat": np.array([16]), "square": np.array([4, 4])}
    return model(body, w=normal(4, 4), b=normal(4), **shapes), [{"x": normal(3, 4)}]


def dynamic_shapes() -> Model:
    """Shapes computed from Shape, with no types stated inside and free dimensions everywhere."""
    body = """g (float[B,C,H,W] x) => (float[B,D] y) {
        c = Conv<pads=[1,1,1,1], kernel_shape=[3,3]>(x, w)  s = Shape(c)  n = Gather(s, zero)  u = Unsqueeze(n, axis)
        t = Concat<axis=0>(u, rest)  f = Reshape(c, t)  g = ReduceMax<keepdims=0>(c, two)  k = Flatten(g)
        m = MatMul(k, v)  e = Expand(m, ones)  y = Add(e, e)
    }"""
    shapes = {"zero": np.array(0), "axis": np.array([0]), "rest": np.array([-1]), "two": np.array([2])}
    proto = model(body, w=normal(4, 3, 3, 3), v=normal(24, 5), ones=np.array([1, 1]), **shapes)
    batches = [{"x": normal(size, 3, 6, 6)} for size in (1, 3)]
    return proto, batches


def sparse_and_functions() -> Model:
    """A sparse initializer as a weight, and a model-local function."""
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[N,4] x) => (float[N,4] y) { h = MatMul(x, w)  s = my.Twice(h)  y = MatMul(s, v) }
        <domain: "my", opset_import: ["" : 17]> Twice (a) => (b) { b = Add(a, a) }"""
    )
    dense = np.zeros((4, 4), np.float32)
    dense[[0, 1, 3], [2, 1, 0]] = [1.5, -2.0, 0.25]
    places = np.flatnonzero(dense)
    values = numpy_helper.from_array(dense.reshape(-1)[places], "w")
    indices = numpy_helper.from_array(places.astype(np.int64), "w_indices")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 4]))
    proto.graph.initializer.append(numpy_helper.from_array(normal(4, 4), "v"))
    return proto, [{"x": normal(3, 4)}]


MODELS: dict[str, tuple[Callable[[], Model], set[str]]] = {
    # What must at least be quantized, by operator type.
    "residual net of an old opset": (residual_net_of_old_opset, {"Conv", "Gemm", "Add", "MaxPool"}),
    "transformer block": (transformer_block, {"MatMul"}),
    "recurrent net": (recurrent_net, {"Gemm"}),
    "nested bodies": (nested_bodies, {"MatMul"}),
    "scan": (scan, {"MatMul"}),
    "strange names": (strange_names, {"MatMul"}),
    "other types": (other_types, {"MatMul"}),
    "every embedding": (every_embedding, {"MatMul"}),
    "half precision": (half_precision, {"Conv", "Gemm", "Add"}),
    "shared everything": (shared_everything, {"MatMul", "Gemm"}),
    "dynamic shapes": (dynamic_shapes, {"Conv", "MatMul"}),
    "sparse and functions": (sparse_and_functions, {"MatMul"}),
}


def kinds(found: Result) -> set[str]:
    return {d.op for d in found.plan.nodes().values() if d.spec is not None}


@pytest.mark.parametrize("target", TARGETS.names())
@pytest.mark.parametrize("name", MODELS)
def test_an_awkward_model_comes_out_valid_and_close(name: str, target: str, tmp_path: Path) -> None:
    build, expected = MODELS[name]
    source, batches = build()
    found = quantize(source, batches, target=target)
    assert signature(found.proto) == signature(source)
    assert expected & set(TARGETS.get(target).kernels) <= kinds(found) | {"Add", "MaxPool"}
    assert all(decision.reason for decision in found.plan.decisions)
    validated(found, batches, tmp_path, min_sqnr_db=20)


def test_the_attention_mask_stays_out_of_every_range() -> None:
    source, batches = transformer_block()
    found = quantize(source, batches)
    assert {d.site.node for d in found.plan.nodes().values() if d.spec is not None} == {
        node.name for node in source.graph.node if node.op_type == "MatMul" and node.input[1].startswith("w")
    }
    assert all(np.isfinite(s.params.scale).all() and s.params.scale < 1 for s in found.result.activations.values())


def test_initializers_that_are_outputs_keep_their_values() -> None:
    source, batches = shared_everything()
    found = quantize(source, batches)
    for wanted, got in list(zip(run(source, batches[0]), run(found.proto, batches[0]), strict=True))[1:]:
        np.testing.assert_array_equal(wanted, got)


def test_a_weight_is_stored_once_per_layout() -> None:
    source, batches = shared_everything()
    found = quantize(source, batches)
    assert sum(a.dtype == np.int8 and a.size == 16 for a in found.initializers().values()) <= 3


@pytest.mark.parametrize("target", ["ort-cpu", "ort-cuda"])
def test_half_precision_scales_come_with_an_opset_that_has_them(target: str) -> None:
    source, batches = half_precision()
    found = quantize(source, batches, target=target)
    scales = {n.input[1] for n in found.proto.graph.node if n.op_type == "QuantizeLinear"}
    held = found.initializers()
    is_half = {held[name].dtype == np.float16 for name in scales}
    assert found.proto.opset_import[0].version >= (19 if True in is_half else 13)
    assert kinds(found) >= {"Conv", "Add", "Gemm"}
    assert error(found, batches[0]) < 0.05


def test_a_bfloat16_model_keeps_its_type() -> None:
    """ONNX Runtime's CPU provider cannot run it; statistics come from elsewhere."""
    body = "g (bfloat16[N,4] x) => (bfloat16[N,6] y) { y = MatMul(x, w) }"
    source = model(body, w=normal(4, 6).astype(ml_dtypes.bfloat16))
    statistics = Calibration(tensors={name: TensorStats(histogram=Histogram.of(normal(9, 6))) for name in "xy"})
    found = quantize(source, calibration=statistics, target="portable")
    assert signature(found.proto) == signature(source)
    assert kinds(found) == {"MatMul"}
    types = {t.name: t.data_type for t in found.proto.graph.initializer}
    assert types["x_scale"] == types["w_scale"] == TensorProto.BFLOAT16


def test_custom_domains_are_quantized_around() -> None:
    body = """g (float[N,4] x) => (float[N,6] y) {
        a = MatMul(x, w)  b = cust.Mystery(a)  c = MatMul(b, v)  y = cust.Conv(c)
    }"""
    source = model(body, domains='"cust" : 1', w=normal(4, 4), v=normal(4, 6))
    statistics = Calibration(tensors={name: TensorStats(histogram=Histogram.of(normal(9, 6))) for name in "xabc"})
    found = quantize(source, calibration=statistics)
    assert {d.site.node for d in found.plan.quantized()} == {"MatMul_0", "MatMul_2"}
    assert "no rule for cust::Mystery" in found.reason("Mystery_1")
    assert "no rule for cust::Conv" in found.reason("Conv_3")


def test_a_model_of_whole_numbers_is_left_alone() -> None:
    source = model(
        "g (int64[N,4] x) => (int64[N,4] y) { h = Add(x, x)  y = MatMul(h, w) }", w=np.ones((4, 4), np.int64)
    )
    found = quantize(source, calibration=Calibration(tensors={}))
    assert not found.plan.quantized()
    assert "int64, not float" in found.reason("MatMul_1")
    assert [n.op_type for n in found.proto.graph.node] == ["Add", "MatMul"]


def test_double_precision_stays_and_says_so() -> None:
    source = model("g (double[N,4] x) => (double[N,4] y) { y = MatMul(x, w) }", w=normal(4, 4).astype(np.float64))
    found = quantize(source)
    assert "float64" in found.reason("MatMul_0")


def test_declared_domains_without_use_and_duplicate_node_names() -> None:
    body = "g (float[N,4] x) => (float[N,4] y) { h = MatMul(x, w)  y = MatMul(h, w) }"
    source = model(body, domains='"unused.domain" : 3', w=normal(4, 4))
    for node in source.graph.node:
        node.name = "same"
    found = quantize(source)
    names = [node.name for node in found.proto.graph.node if node.op_type == "MatMul"]
    assert names == ["same", "same_0"], "ONNX Runtime refuses two nodes of one name"
    assert len(found.plan.nodes()) == 2


def test_graphs_are_prepared_the_same_way_every_time() -> None:
    for build, _ in MODELS.values():
        source, _ = build()
        first, second = (graph.to_proto(prepare(graph.from_proto(source))) for _ in range(2))
        assert first == second


def test_a_large_sparse_weight_stays_sparse_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    source, batches = sparse_and_functions()
    monkeypatch.setattr(sys.modules["qpipe.pipeline.passes.densify_sparse"], "LARGEST", 16)
    found = quantize(source, batches)
    assert "sparse" in found.reason("MatMul_0")
    assert [t.values.name for t in found.proto.graph.sparse_initializer] == ["w"]


def test_a_small_sparse_weight_is_quantized() -> None:
    source, batches = sparse_and_functions()
    found = quantize(source, batches)
    assert len(found.plan.quantized()) == 4
    assert not found.proto.graph.sparse_initializer
    assert error(found, batches[0]) < 0.05
