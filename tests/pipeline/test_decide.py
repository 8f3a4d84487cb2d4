"""What is decided, and the reasons that are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser
from qpipe.calibrate.errors import DataError, RecipeError
from qpipe.pipeline import graph
from qpipe.pipeline.calibration import Calibration
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.stages.decide import decide, wanted_tensors
from qpipe.pipeline.stages.prepare import prepare
from quantizing import Result, calibrate, model, normal, quantize, random_batches, run

IF = """g (float[N,4] x, bool c) => (float[N,6] y) {
    h = MatMul(x, v)
    y = If(c)<
        then_branch = t () => (float[N,6] a) { a = MatMul(h, w) },
        else_branch = e () => (float[N,6] b) { u = MatMul(x, w2)  b = Relu(u) }
    >
}"""
IF_WEIGHTS = {"v": normal(4, 4), "w": normal(4, 6), "w2": normal(4, 6, seed=3)}


def both(x: Any) -> list[dict[str, Any]]:
    return [{"x": x, "c": np.array(flag)} for flag in (True, False)]


def small(body: str = "y = MatMul(x, w)", **weights: Any) -> onnx.ModelProto:
    return model(f"g (float[N,4] x) => (float[N,4] y) {{ {body} }}", **(weights or {"w": normal(4, 4)}))


def quantized(found: Result) -> set[str]:
    return {name for name, decision in found.plan.nodes().items() if decision.spec is not None}


@pytest.mark.parametrize(
    ("body", "weights", "node", "words"),
    [
        ("y = Softmax(x)", {}, "Softmax_0", "orders of magnitude"),
        ("y = LayerNormalization(x, w)", {"w": normal(4)}, "LayerNormalization_0", "normalization"),
        ("y = Tanh(x)", {}, "Tanh_0", "no integer kernel gains"),
        ("y = Add(x, x)", {}, "Add_0", "is float"),
        ("t = Transpose(x)  s = MatMul(x, t)  y = MatMul(s, x)", {}, "MatMul_1", "attention"),
        ("y = Hardmax(x)", {}, "Hardmax_0", "no rule for Hardmax"),
        ("y = Relu(x)", {}, "Relu_0", "is float"),
        ('y = Einsum<equation="ij,kj->ik">(x, x)', {}, "Einsum_0", "product with a matrix"),
    ],
)
def test_reasons_to_stay_in_float(body: str, weights: dict[str, Any], node: str, words: str) -> None:
    source = model(f"g (float[4,4] x) => (float[4,4] y) {{ {body} }}", **weights)
    found = quantize(source)
    assert not found.plan.quantized()
    assert words in found.reason(node)


def test_every_node_has_a_decision_and_every_decision_a_reason() -> None:
    source = model(IF, **IF_WEIGHTS)
    found = quantize(source, both(normal(3, 4)))
    prepared = prepare(graph.from_proto(source))
    names = {node.name for inner in graph.all_graphs(prepared.graph) for node in inner.nodes}
    assert {decision.site.node for decision in found.plan.decisions} == names
    assert all(decision.reason for decision in found.plan.decisions)


def test_bodies_are_quantized_and_read_outer_tensors_by_their_names() -> None:
    found = quantize(model(IF, **IF_WEIGHTS), both(normal(3, 4)))
    assert quantized(found) == {"MatMul_0", "MatMul_1", "MatMul_2"}
    inside = found.proto.graph.node[-1].attribute[0].g
    assert [node.op_type for node in inside.node] == [
        "QuantizeLinear",
        "DequantizeLinear",
        "DequantizeLinear",
        "MatMul",
    ]
    assert inside.node[0].input[0] in ("h", "x")


def test_what_stays_inside_a_body_says_where_it_is() -> None:
    found = quantize(model(IF, **IF_WEIGHTS), both(normal(3, 4)))
    relu = next(d for d in found.plan.decisions if d.op == "Relu")
    assert relu.reason.startswith("inside If 'If_1', else_branch: ")


def test_a_branch_that_was_not_seen_stays_in_float() -> None:
    found = quantize(model(IF, **IF_WEIGHTS), [{"x": normal(3, 4), "c": np.array(True)}])
    assert quantized(found) == {"MatMul_0", "MatMul_1"}, "what the other branch reads was seen, but it never ran"
    assert "no batch took this branch" in found.reason("MatMul_2")
    inner = IF.replace("u = MatMul(x, w2)", "k = Tanh(x)  u = MatMul(k, w2)")
    found = quantize(model(inner, **IF_WEIGHTS), [{"x": normal(3, 4), "c": np.array(True)}])
    assert quantized(found) == {"MatMul_0", "MatMul_1"}
    assert "no finite value" in found.reason("MatMul_2")


LOOP = """g (int64 n, bool c, float[3,4] x) => (float[3,4] y) {
    y = Loop(n, c, x)<body = b (int64 i, bool ci, float[3,4] s) => (bool co, float[3,4] t) {
        co = Identity(ci)  h = Tanh(s)  m = MatMul(h, w)  t = Relu(m)
    }>
}"""


def test_loop_bodies_are_quantized() -> None:
    source = model(LOOP, w=normal(4, 4))
    batch = {"n": np.array(3), "c": np.array(True), "x": normal(3, 4)}
    found = quantize(source, [batch])
    assert len(quantized(found)) == 1
    assert "w" not in found.initializers()


def test_calls_of_functions_and_what_is_in_them_are_kept() -> None:
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[N,4] x) => (float[N,4] y) { h = my.Twice(x)  y = MatMul(h, w) }
        <domain: "my", opset_import: ["" : 17]> Twice (a) => (b) { c = MatMul(a, a)  b = Add(a, a) }"""
    )
    proto.graph.node[0].name, proto.graph.node[1].name = "call", "product"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(normal(4, 4), "w"))
    del proto.functions[0].node[0]
    found = quantize(proto)
    assert quantized(found) == {"product"}
    assert "model-local function Twice" in found.reason("call")
    assert "inside the model-local function Twice" in found.reason("my::Twice/Add_0")
    assert [f.name for f in found.proto.functions] == ["Twice"]


def test_a_function_hides_an_operator_of_its_name() -> None:
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[N,4] x) => (float[N,4] y) { y = my.MatMul(x, w) }
        <domain: "my", opset_import: ["" : 17]> MatMul (a, b) => (c) { c = Add(a, b) }"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(normal(4), "w"))
    assert not quantize(proto).plan.quantized()


@pytest.mark.parametrize(
    ("keys", "expected", "words"),
    [
        ({"exclude": ("MatMul_0",)}, {"MatMul_1"}, "excluded by the pattern"),
        ({"exclude": ("re:_0$",)}, {"MatMul_1"}, "excluded by the pattern"),
        ({"include": ("MatMul_1",)}, {"MatMul_1"}, "no --include pattern"),
        ({"layers": ({"match": "MatMul_0", "scheme": "float"},)}, {"MatMul_1"}, "leaves this layer in float"),
        ({"exclude": ("op:MatMul",)}, set(), "excluded by the pattern"),
    ],
)
def test_patterns(keys: dict[str, Any], expected: set[str], words: str) -> None:
    found = quantize(small("h = MatMul(x, w)  y = MatMul(h, w)"), **keys)
    assert quantized(found) == expected
    assert words in found.reason("MatMul_0")


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="matches no node") as caught:
        quantize(small(), exclude=("MatMull_0",))
    assert "MatMul_0" in str(caught.value.expected)


def test_patterns_reach_into_bodies() -> None:
    found = quantize(model(IF, **IF_WEIGHTS), both(normal(3, 4)), exclude=("MatMul_1",))
    assert quantized(found) == {"MatMul_0", "MatMul_2"}


def test_static_scales_need_statistics() -> None:
    prepared = prepare(graph.from_proto(small()))
    with pytest.raises(DataError, match="statistics"):
        decide(prepared.graph, make_recipe(), None)


def test_an_unknown_tensor_is_named() -> None:
    found = quantize(small(), calibration=Calibration(tensors={}))
    assert "'x'" in found.reason("MatMul_0")
    assert "not collected" in found.reason("MatMul_0")


def test_mask_sentinels_never_enter_a_range() -> None:
    x, w = normal(3, 4), normal(4, 4)
    x[0, 0], w[0] = -3.4e38, 0
    found = quantize(small(w=w), [{"x": x}])
    assert not found.plan.quantized()
    assert "sentinels" in found.reason("MatMul_0")


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("recipe", [{}, {"activations": {"format": "int8", "symmetric": True}}], ids=["u8", "s8"])
def test_movers_join_whoever_reads_them(opset: int, recipe: dict[str, Any]) -> None:
    """At opset 21 ONNX Runtime fails when it has to move a DequantizeLinear of int8 behind them itself."""
    source = model(
        """g (float[N,2,4,4] x) => (float[N,32] y) {
            c = Conv(x, w)  m = MaxPool<kernel_shape=[1,1]>(c)  f = Flatten(m)  y = Tanh(f)
        }""",
        opset=opset,
        w=normal(2, 2, 1, 1),
    )
    found = quantize(source, **recipe)
    assert quantized(found) == {"Conv_0", "MaxPool_1", "Flatten_2"}
    assert len({found.scale_of(f"{name}_DequantizeLinear_Output") for name in "cmf"}) == 1
    run(found.proto, random_batches(source, 1)[0], exact=False)


def test_a_quantizer_stands_before_a_body_that_reads_what_moves() -> None:
    """ONNX Runtime crashes when it moves a DequantizeLinear through MaxPool or Transpose up to the border of a body."""
    source = model(
        """g (float[2,2,4,4] x, bool f) => (float[2,2,4,4] y) {
            c = Conv(x, w)  m = MaxPool<kernel_shape=[1,1]>(c)
            y = If(f)<then_branch = t () => (float[2,2,4,4] a) { a = Tanh(m) },
                      else_branch = e () => (float[2,2,4,4] b) { b = Relu(x) }>
        }""",
        w=normal(2, 2, 1, 1),
    )
    found = quantize(source, [{"x": normal(2, 2, 4, 4), "f": np.array(flag)} for flag in (True, False)])
    assert quantized(found) == {"Conv_0", "MaxPool_1"}


def test_wanted_tensors_are_float_and_no_constants() -> None:
    source = model(IF, **IF_WEIGHTS)
    prepared = prepare(graph.from_proto(source))
    assert set(wanted_tensors(prepared.graph)) == {"x", "h", "a", "u", "b"}


def test_one_scale_per_tensor_below_opset_13_and_said_so() -> None:
    source = model("g (float[N,4] x) => (float[N,6] y) { y = MatMul(x, w) }", opset=11, ir=6, w=normal(4, 6))
    found = quantize(source)
    assert found.proto.opset_import[0].version == 11
    weight = next(d for d in found.sites("MatMul_0") if d.site.role == "weight")
    assert weight.spec is not None
    assert weight.spec.granularity.axis is None
    assert "opset 11" in weight.reason
    assert "--upgrade" in weight.reason


def test_decisions_come_in_the_order_of_slots() -> None:
    body = "g (float[N,3,4,4] x) => (float[N,2,4,4] y) { y = Conv(x, w, b) }"
    found = quantize(model(body, w=normal(2, 3, 1, 1), b=normal(2)))
    assert [d.site.slot for d in found.sites("Conv_0")] == ["in0", "in1", "in2", "out0"]


def test_statistics_of_sibling_bodies_are_not_confused() -> None:
    """Both branches call their tensor ``h``: which of them statistics are of cannot be told."""
    source = model(
        """g (float[N,4] x, bool c) => (float[N,4] y) {
            y = If(c)<then_branch = t () => (float[N,4] a) { h = Tanh(x)  a = MatMul(h, w) },
                      else_branch = e () => (float[N,4] b) { h = Exp(x)  b = MatMul(h, w) }>
        }""",
        w=normal(4, 4),
    )
    found = quantize(source, both(normal(3, 4)))
    assert not found.plan.quantized()
    assert "several bodies" in found.reason("MatMul_1")


def test_the_plan_is_data() -> None:
    source = small()
    found = quantize(source, calibration=calibrate(source, random_batches(source)))
    data = found.plan.to_dict()
    assert data["decisions"][0]["node"] == "MatMul_0"
    assert data["decisions"][0]["spec"] == "uint8 per tensor, asymmetric"
    assert all(isinstance(entry["reason"], str) for entry in data["decisions"])
