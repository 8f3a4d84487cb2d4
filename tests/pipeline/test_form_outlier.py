"""The scheme w8a8-outlier: what the graph becomes, and that the result is what the operator's contract says."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import inliner, numpy_helper
from outlying import LOUD, loud_batches, outlier, statistics
from qpipe.pipeline import graph
from qpipe.pipeline.calibration.observe import Detail
from qpipe.pipeline.session import SessionExtras, make_session
from qpipe.pipeline.stages.details import wanted_details
from qpipe.pipeline.stages.prepare import prepare
from qpipe.plugins.outlier_matmul import op as contract
from quantizing import Result, calibrate, error, model, normal, quantize, run

NET = "g (float[N,T,96] x) => (float[N,T,80] y) { m = MatMul(x, w)  y = Add(b, m) }"


def net() -> onnx.ModelProto:
    return model(NET, w=normal(96, 80) * 0.1, b=normal(80))


def test_a_product_and_its_bias_become_one_node_with_the_loud_columns() -> None:
    done = outlier(net(), loud_batches())
    assert done.ops() == {"OutlierMatMul": 1}
    node = done.proto.graph.node[0]
    assert (node.domain, len(node.input), node.output[0]) == ("qpipe", 6, "y")
    held = done.initializers()
    assert held[node.input[3]].tolist() == list(LOUD)
    assert held[node.input[1]].dtype == np.int8
    assert not held[node.input[1]][:, LOUD].any(), "codes of outlier columns are zero"
    assert "3 outlier columns" in done.reason("MatMul_0")


@pytest.mark.parametrize("plugin", [True, False])
def test_the_model_computes_what_the_contract_says(plugin: bool) -> None:
    proto, batch = net(), loud_batches()[0]
    done = outlier(proto, loud_batches())
    held = done.initializers()
    node = done.proto.graph.node[0]
    packed = contract.Packed(**dict(zip(contract.INPUTS[1:5], (held[name] for name in node.input[1:5]), strict=True)))
    limit = next(a.f for a in node.attribute if a.name == "limit")
    expected, _ = contract.reference(batch["x"], packed, held[node.input[5]], limit=limit)
    session = make_session(done.proto, extras=SessionExtras(plugin=plugin))
    np.testing.assert_allclose(session.run(None, batch)[0], expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_it_is_far_nearer_to_float_than_a_shared_scale() -> None:
    proto, batches = net(), loud_batches()
    plain = quantize(proto, batches, scheme="w8a8", target="ort-cpu-vnni")
    assert error(outlier(proto, batches), batches[0]) < error(plain, batches[0]) / 5


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_in_both_layouts(transposed: int) -> None:
    w = normal(96, 80) * 0.1
    body = f"g (float[N,96] x) => (float[N,80] y) {{ y = Gemm<transB = {transposed}>(x, w, b) }}"
    proto = model(body, w=np.ascontiguousarray(w.T) if transposed else w, b=normal(80))
    batches = [{"x": batch["x"][0]} for batch in loud_batches()]
    done = outlier(proto, batches)
    assert done.ops() == {"OutlierMatMul": 1}
    assert error(done, batches[0]) < 0.02


def test_where_nothing_stands_out_one_column_keeps_the_body_portable() -> None:
    done = outlier(net(), loud_batches(factor=1.0))
    node = done.proto.graph.node[0]
    assert done.initializers()[node.input[3]].size == 1
    assert error(done, loud_batches(factor=1.0)[0]) < 0.02


def test_no_bias_becomes_zeros_for_runtimes_that_need_one() -> None:
    done = outlier(
        model("g (float[N,T,96] x) => (float[N,T,80] y) { y = MatMul(x, w) }", w=normal(96, 80)), loud_batches()
    )
    assert not done.initializers()[done.proto.graph.node[0].input[5]].any()


QKV = """g (float[N,T,96] x) => (float[N,T,80] q, float[N,T,48] k, float[N,T,33] v) {
    a = MatMul(x, wq)  q = Add(a, bq)  k = MatMul(x, wk)  c = MatMul(x, wv)  v = Add(bv, c)
}"""


def qkv() -> onnx.ModelProto:
    weights = {"wq": normal(96, 80), "wk": normal(96, 48, seed=1), "wv": normal(96, 33, seed=2)}
    return model(QKV, **weights, bq=normal(80), bv=normal(33))


@pytest.mark.parametrize("plugin", [True, False])
def test_siblings_become_one_product_with_the_same_numbers(plugin: bool) -> None:
    proto, batches = qkv(), loud_batches()
    done = outlier(proto, batches)
    assert done.ops() == {"OutlierMatMul": 1, "Split": 1}
    assert [output.name for output in done.proto.graph.output] == ["q", "k", "v"]
    session = make_session(done.proto, extras=SessionExtras(plugin=plugin))
    together = session.run(["q", "k", "v"], batches[0])
    for name, weight in (("q", "wq"), ("k", "wk"), ("v", "wv")):
        others = {"wq", "wk", "wv"} - {weight}
        alone = outlier(proto, batches, exclude=tuple(node_of(proto, other) for other in others))
        assert alone.ops()["OutlierMatMul"] == 1
        apart = make_session(alone.proto, extras=SessionExtras(plugin=plugin)).run([name], batches[0])[0]
        np.testing.assert_array_equal(together[["q", "k", "v"].index(name)], apart)


def node_of(proto: onnx.ModelProto, weight: str) -> str:
    prepared = prepare(graph.from_proto(proto)).graph
    return next(node.name for node in prepared.nodes if any(t.name == weight for t in node.inputs))


def test_products_of_different_tensors_stay_apart() -> None:
    body = "g (float[N,T,96] x) => (float[N,T,96] y, float[N,T,80] z) { y = MatMul(x, w)  z = MatMul(y, v) }"
    done = outlier(model(body, w=normal(96, 96), v=normal(96, 80)), loud_batches())
    assert done.ops() == {"OutlierMatMul": 2}


@pytest.mark.parametrize("runtime", ["openvino", "tract"])
@pytest.mark.parametrize("factor", [1.0, 50.0])
def test_the_file_runs_elsewhere_once_its_functions_are_inlined(runtime: str, factor: float, tmp_path: Path) -> None:
    proto, batches = qkv(), loud_batches(factor=factor)
    done = outlier(proto, batches)
    expected = make_session(done.proto).run(["q", "k", "v"], batches[0])
    inlined = inliner.inline_local_functions(done.proto)
    got = (run_openvino if runtime == "openvino" else run_tract)(inlined, batches[0]["x"], tmp_path)
    for theirs, ours in zip(got, expected, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=2e-5 * np.abs(ours).max())


def run_openvino(proto: onnx.ModelProto, x: np.ndarray, _folder: Path) -> list[np.ndarray]:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(proto.SerializeToString()), "CPU", settings)
    results = compiled([x])
    return [results[i] for i in range(3)]


def run_tract(proto: onnx.ModelProto, x: np.ndarray, folder: Path) -> list[np.ndarray]:
    tract = pytest.importorskip("tract", reason="tract is not installed")
    extents = dict(zip("NT", x.shape, strict=False))
    for info in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = extents[dim.dim_param]
    onnx.save(proto, folder / "model.onnx")
    found = tract.onnx().load(str(folder / "model.onnx")).into_model().into_runnable().run([x])
    return [value.to_numpy() for value in found]


def test_the_cap_keeps_the_largest_and_says_so() -> None:
    done = outlier(net(), loud_batches(), outliers={"cap": 2})
    assert len(done.initializers()[done.proto.graph.node[0].input[3]]) == 2
    assert "1 more beyond the cap" in done.reason("MatMul_0")


def test_a_new_outlier_at_run_time_is_counted_and_does_not_ruin_its_row() -> None:
    proto = net()
    done = outlier(proto, loud_batches())
    blind = outlier(proto, loud_batches(), outliers={"headroom": 0.0})
    surprise = loud_batches(1)[0]
    surprise["x"][0, 0, 60] = 400.0
    assert error(done, surprise) < error(blind, surprise) / 3


@pytest.mark.parametrize("plugin", [True, False])
def test_new_outliers_can_be_an_output_of_the_model(plugin: bool) -> None:
    body = "g (float[N,T,96] x) => (float[N,T,80] y) { h = MatMul(x, w)  y = MatMul(h, v) }"
    proto = model(body, w=normal(96, 90) * 0.1, v=normal(90, 80) * 0.1)
    done = outlier(proto, loud_batches(), outliers={"counter": True})
    assert [output.name for output in done.proto.graph.output] == ["y", "new_outliers"]
    onnx.checker.check_model(done.proto)
    names = next(entry.value for entry in done.proto.metadata_props if entry.key == "qpipe.new_outliers").split(", ")
    assert names == [node.name for node in done.proto.graph.node if node.op_type == "OutlierMatMul"]
    session = make_session(done.proto, extras=SessionExtras(plugin=plugin))
    assert session.get_outputs()[1].shape == [2]
    known, surprise = loud_batches(1)[0], loud_batches(1)[0]
    surprise["x"][0, 0, 60:63] = 400.0
    assert session.run(["new_outliers"], known)[0].tolist() == [0, 0]
    met = session.run(["new_outliers"], surprise)[0]
    assert met.dtype == np.int64
    assert met[0] == 3


def test_without_a_layer_that_counts_there_is_no_such_output() -> None:
    done = outlier(net(), loud_batches(), outliers={"counter": True, "headroom": 0.0})
    assert [output.name for output in done.proto.graph.output] == ["y"]
    assert any("counts new outliers" in note for note in done.result.notes)


@pytest.mark.parametrize("shape", [(80,), (1, 80), (1,), (3, 1), (3, 80), ()])
def test_the_bias_of_a_gemm_is_kept_whatever_its_shape(shape: tuple[int, ...]) -> None:
    body = "g (float[3,96] x) => (float[3,80] y) { y = Gemm(x, w, b) }"
    proto = model(body, w=normal(96, 80) * 0.1, b=(5 + normal(*shape)).astype(np.float32))
    batches = [{"x": normal(3, 96, seed=i)} for i in range(3)]
    done = outlier(proto, batches)
    assert ("OutlierMatMul" in done.ops()) == (shape in ((80,), (1, 80)))
    assert error(done, batches[0]) < 0.02


@pytest.mark.parametrize("shape", [(80,), (1, 80), (1, 1, 80), (1,)])
@pytest.mark.parametrize("rank", [1, 2])
def test_an_addition_keeps_the_shape_that_it_makes(shape: tuple[int, ...], rank: int) -> None:
    inputs, outputs = [("3,96", "3,80"), ("96", "80")][rank % 2]
    made = np.broadcast_shapes(tuple(map(int, outputs.split(","))), shape)
    body = f"g (float[{inputs}] x) => (float[{','.join(map(str, made))}] y) {{ m = MatMul(x, w)  y = Add(m, b) }}"
    proto = model(body, w=normal(96, 80) * 0.1, b=(5 + normal(*shape)).astype(np.float32))
    batches = [{"x": normal(*map(int, inputs.split(",")), seed=i)} for i in range(3)]
    done = outlier(proto, batches)
    assert run(done.proto, batches[0])[0].shape == made
    assert error(done, batches[0]) < 0.02


REFUSED = {
    "depth": ("g (float[N,32] x) => (float[N,8] y) { y = MatMul(x, w) }", {"w": normal(32, 8)}, "only 32 inputs"),
    "scaled": (
        "g (float[N,96] x) => (float[N,8] y) { y = Gemm<alpha = 2.0>(x, w) }",
        {"w": normal(96, 8)},
        "scales or transposes",
    ),
    "stack": (
        "g (float[2,N,96] x) => (float[2,N,8] y) { y = MatMul(x, w) }",
        {"w": normal(2, 96, 8)},
        "two dimensions",
    ),
    "conv": (
        "g (float[N,4,9,9] x) => (float[N,8,7,7] y) { y = Conv<kernel_shape = [3, 3]>(x, w) }",
        {"w": normal(8, 4, 3, 3)},
        "Conv",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_layer_that_does_not_fit_stays_float_with_a_reason(kind: str) -> None:
    body, weights, words = REFUSED[kind]
    proto = model(body, **weights)
    shape = [d.dim_value or 3 for d in proto.graph.input[0].type.tensor_type.shape.dim]
    done = outlier(proto, [{"x": normal(*shape)}])
    name = proto.graph.node[0].name
    assert words in done.reason(name)
    assert "OutlierMatMul" not in done.ops()


def small(inputs: int, factor: float, **recipe: object) -> Result:
    """A layer of few inputs, three of which are ``factor`` times as large as the rest."""
    proto = model(NET.replace("96", str(inputs)), w=normal(inputs, 80) * 0.1, b=normal(80))
    batches = [{"x": normal(2, 5, inputs, seed=i)} for i in range(3)]
    for batch in batches:
        batch["x"][..., [1, 5, 9]] *= factor
    return quantize(proto, calibration=statistics(proto, batches), **{"scheme": "w8a8-outlier", **recipe})


@pytest.mark.parametrize("target", ["ort-cpu", "ort-cpu-vnni"])
def test_a_small_layer_without_outliers_is_left_to_static_scales(target: str) -> None:
    done = small(96, 1.0, target=target)
    assert done.ops() == {"QuantizeLinear": 1, "DequantizeLinear": 2, "MatMul": 1, "Add": 1}
    reasons = {d.site.role: d.reason for d in done.sites("MatMul_0")}
    assert "static scales, as w8a8 gives" in reasons["weight"]
    assert error(done, {"x": normal(2, 5, 96)}) < 0.02
    as_w8a8 = small(96, 1.0, target=target, scheme="w8a8", equalize="none")
    assert done.initializers().keys() == as_w8a8.initializers().keys()
    for name, value in as_w8a8.initializers().items():
        np.testing.assert_array_equal(done.initializers()[name], value)


def test_only_the_small_layer_is() -> None:
    body = "g (float[N,96] x) => (float[N,80] y) { a = MatMul(x, w)  b = Relu(a)  y = MatMul(b, v) }"
    proto = model(body, w=normal(96, 160) * 0.1, v=normal(160, 80) * 0.1)
    done = quantize(proto, calibration=statistics(proto, [{"x": normal(9, 96)}]), scheme="w8a8-outlier")
    assert done.ops() == {"QuantizeLinear": 1, "DequantizeLinear": 2, "MatMul": 1, "Relu": 1, "OutlierMatMul": 1}


@pytest.mark.parametrize(
    ("inputs", "factor", "recipe", "words"),
    [
        (96, 50.0, {}, "hold 3 outlier columns"),
        (63, 1.0, {}, "gain nothing below 64"),
        (96, 1.0, {"target": "ort-cuda"}, "runs no static scales"),
        (96, 1.0, {"scheme": "w8a8-vector"}, "need data"),
    ],
)
def test_a_small_layer_that_static_scales_do_not_suit_stays_float(
    inputs: int, factor: float, recipe: dict[str, str], words: str
) -> None:
    done = small(inputs, factor, **recipe)
    assert done.ops() == {"MatMul": 1, "Add": 1}
    assert f"only {inputs} inputs" in done.reason("MatMul_0")
    assert words in done.reason("MatMul_0")


def test_without_magnitudes_per_channel_the_remedy_is_named() -> None:
    proto = net()
    known = calibrate(proto, loud_batches())
    done = quantize(proto, calibration=known, scheme="w8a8-outlier", outliers={"min_inputs": 64})
    assert "--detail channels" in done.reason("MatMul_0")


def test_a_shared_product_keeps_its_other_readers() -> None:
    body = "g (float[N,96] x) => (float[N,80] y, float[N,80] z) { m = MatMul(x, w)  y = Add(m, b)  z = Relu(m) }"
    proto = model(body, w=normal(96, 80) * 0.1, b=normal(80))
    batches = [{"x": batch["x"][0]} for batch in loud_batches()]
    done = outlier(proto, batches)
    assert done.ops() == {"OutlierMatMul": 1, "Add": 1, "Relu": 1}
    assert error(done, batches[0]) < 0.02


IN_BRANCHES = """g (float[N,96] x, bool c) => (float[N,80] y) {
    y = If (c) <then_branch = t () => (float[N,80] a)
                { p = MatMul(x, w)  q = Add(p, b)  r = MatMul(x, v)  a = Mul(q, r) },
                else_branch = e () => (float[N,80] d) { s = MatMul(x, w)  d = Relu(s) }>
}"""


@pytest.mark.parametrize("plugin", [True, False])
def test_layers_in_branches_of_an_if_keep_their_outliers(plugin: bool) -> None:
    """Weights of both branches lie in the main graph; siblings join within their branch only."""
    proto = model(IN_BRANCHES, w=normal(96, 80) * 0.1, v=normal(96, 80) * 0.1, b=normal(80))
    batches = [{"x": batch["x"][0], "c": np.array(taken)} for batch in loud_batches(2) for taken in (True, False)]
    done = outlier(proto, batches)
    bodies = [attribute.g for attribute in done.proto.graph.node[0].attribute]
    ops = [sorted(node.op_type for node in body.node if node.op_type != "Constant") for body in bodies]
    assert sorted(ops) == [["Mul", "OutlierMatMul", "Split"], ["OutlierMatMul", "Relu"]]
    held = {t.name: numpy_helper.to_array(t) for g in (done.proto.graph, *bodies) for t in g.initializer}
    for node in (node for body in bodies for node in body.node if node.op_type == "OutlierMatMul"):
        assert held[node.input[3]].tolist() == list(LOUD)
    session = make_session(done.proto, extras=SessionExtras(plugin=plugin))
    for batch in batches:
        expected = run(proto, batch)[0]
        np.testing.assert_allclose(session.run(None, batch)[0], expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_half_precision_models_keep_their_type() -> None:
    body = "g (float16[N,96] x) => (float16[N,80] y) { y = MatMul(x, w) }"
    proto = model(body, w=(normal(96, 80) * 0.1).astype(np.float16))
    batches = [{"x": batch["x"][0].astype(np.float16)} for batch in loud_batches()]
    done = outlier(proto, batches)
    assert done.ops()["OutlierMatMul"] == 1
    assert run(done.proto, batches[0])[0].dtype == np.float16
    assert error(done, batches[0]) < 0.02


def test_polygraphys_own_command_line_runs_the_body(tmp_path: Path) -> None:
    done = outlier(net(), loud_batches())
    onnx.save(done.proto, tmp_path / "q.onnx")
    tool = Path(sys.executable).with_name("polygraphy")
    shapes = ["--input-shapes", "x:[2,5,96]"]
    found = subprocess.run([tool, "run", tmp_path / "q.onnx", "--onnxrt", *shapes], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-1500:] + found.stderr[-1500:]


def test_statistics_of_a_conv_input_come_in_the_order_of_its_weight() -> None:
    body = "g (float[N,4,6,6] x) => (float[N,8,4,4] y) { y = Conv<kernel_shape = [3, 3]>(x, w) }"
    proto = model(body, w=normal(8, 4, 3, 3))
    x = normal(2, 4, 6, 6)
    x[:, 2] *= 9
    found = statistics(proto, [{"x": x}], "gram")
    assert dataclasses.is_dataclass(found.tensors["x"])
    assert found.tensors["x"].gram.matrix.shape == (36, 36)
    from qpipe.pipeline.layouts import layout_of
    from qpipe.pipeline.stages.weights import layer_stats

    node = prepare(graph.from_proto(proto)).graph.nodes[0]
    stats = layer_stats(layout_of(node, (8, 4, 3, 3)), found, "x")
    assert (stats.channels.amax.reshape(9, 4).argmax(axis=1) == 2).all(), "columns are (position, channel)"
    weight = numpy_helper.to_array(proto.graph.initializer[0])
    matrix = layout_of(node, weight.shape).matrix(weight)
    assert np.array_equal(matrix[5].reshape(3, 3, 4), weight[5].transpose(1, 2, 0))


def test_details_follow_the_level() -> None:
    proto = model(NET, w=normal(96, 80), b=normal(80))
    prepared = prepare(graph.from_proto(proto)).graph
    assert wanted_details(prepared, "none") == {}
    assert wanted_details(prepared, "channels") == {"x": Detail(axis=-1, gram=False)}
    assert wanted_details(prepared, "gram") == {"x": Detail(axis=-1, gram=True)}
