"""Weights as operators see them, patterns that pick nodes, and the plan as data."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from qpipe.calibrate.errors import RecipeError
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import per_block, per_channel
from qpipe.calibrate.qarray import Spec
from qpipe.pipeline import graph
from qpipe.pipeline.constants import dtype_name, is_float, weight_of
from qpipe.pipeline.patterns import matches, near_names, require_matches
from qpipe.pipeline.plan import Decision, Plan, Site, spec_text
from quantizing import model, normal, run

LAYOUTS = {
    "w": "w",
    "Transpose": "t = Transpose(w)",
    "Transpose perm": "t = Transpose<perm=[1,0]>(w)",
    "Reshape": "t = Reshape(w, flat)",
    "Reshape with 0 and -1": "t = Reshape(w, keep)",
    "both": "a = Transpose(w)  b = Reshape(a, flat)  t = Reshape(b, wide)",
    "Identity": "a = Identity(w)  t = Transpose(a)",
}
SHAPES = {"flat": np.array([12]), "keep": np.array([0, -1, 2]), "wide": np.array([2, 6])}


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "w"])
def test_a_weight_is_what_the_operators_before_it_make_of_the_constant(name: str) -> None:
    used = {key: array for key, array in SHAPES.items() if re.search(rf"\b{key}\b", LAYOUTS[name])}
    source = model(f"g () => (float[A] t) {{ {LAYOUTS[name]} }}", w=normal(3, 4), **used)
    found = weight_of(graph.from_proto(source).graph.outputs[0])
    assert found is not None
    source.graph.output[0].type.tensor_type.ClearField("shape")
    expected = run(source, {})[0]
    np.testing.assert_array_equal(found.values(), expected)
    assert found.shape == expected.shape


def test_the_same_values_in_the_same_layout_have_the_same_key() -> None:
    text = """g () => (float[A] p, float[B] q, float[C] r, float[D] s) {
        p = Transpose(w)  q = Transpose<perm=[1,0]>(w)  a = Reshape(w, flat)  r = Reshape(a, own)  s = Identity(w)
    }"""
    outputs = graph.from_proto(model(text, w=normal(3, 4), flat=np.array([12]), own=np.array([3, 4]))).graph.outputs
    keys = [weight.key for output in outputs if (weight := weight_of(output)) is not None]
    assert keys[0] == keys[1]
    assert keys[2] == keys[3] == "w"
    assert keys[0] != keys[2]


@pytest.mark.parametrize(
    "text", ["t = Tanh(w)", "t = Add(w, w)", "t = my.Transpose(w)", "s = Shape(w)  t = Reshape(w, s)"]
)
def test_what_computes_is_no_weight(text: str) -> None:
    source = model(f"g () => (float[3,4] t) {{ {text} }}", w=normal(3, 4), domains='"my" : 1')
    assert weight_of(graph.from_proto(source).graph.outputs[0]) is None


def test_inputs_and_results_are_no_weights() -> None:
    found = graph.from_proto(model("g (float[2] x) => (float[2] y) { y = Tanh(x) }")).graph
    assert weight_of(found.inputs[0]) is None
    assert weight_of(found.outputs[0]) is None


@pytest.mark.parametrize(
    ("dtype", "name", "real"),
    [
        (np.float32, "float32", True),
        (np.float16, "float16", True),
        (ml_dtypes.bfloat16, "bfloat16", True),
        (np.float64, "float64", True),
        (np.int64, "int64", False),
        (np.bool_, "bool", False),
        (None, "", False),
        (16, "bfloat16", True),
    ],
)
def test_names_of_types(dtype: object, name: str, real: bool) -> None:
    tensor = gs.Variable("x", dtype=dtype)
    assert (dtype_name(tensor), is_float(tensor)) == (name, real)


def node(name: str, op: str = "MatMul") -> gs.Node:
    return gs.Node(op, name)


@pytest.mark.parametrize(
    ("pattern", "picks"),
    [
        ("layer.0/query", True),
        ("layer.*", True),
        ("*query", True),
        ("query", False),
        ("re:query$", True),
        ("re:^query", False),
        (r"re:layer\.\d", True),
        ("op:MatMul", True),
        ("op:Mat*", True),
        ("op:Gemm", False),
        ("Layer.*", False),
    ],
)
def test_patterns(pattern: str, picks: bool) -> None:
    assert matches(pattern, node("layer.0/query")) is picks


def test_a_broken_expression_is_refused() -> None:
    with pytest.raises(RecipeError, match="regular expression"):
        matches("re:(", node("a"))


@pytest.mark.parametrize(("pattern", "near"), [("op:MatMull", "MatMul"), ("layer.1/key", "layer.0/key")])
def test_a_pattern_without_a_match_names_near_ones(pattern: str, near: str) -> None:
    with pytest.raises(RecipeError, match="matches no node") as caught:
        require_matches([pattern], [node("layer.0/key"), node("head", "Gemm")])
    assert near in str(caught.value.expected)
    require_matches(["layer.0/*", "op:Gemm"], [node("layer.0/key"), node("head", "Gemm")])


def test_near_names_fall_back_to_the_first() -> None:
    assert near_names("zzz", ["a", "b", "c", "d"]) == ["a", "b", "c"]


def decision(name: str, slot: str, spec: Spec | None) -> Decision:
    site = Site(node=name, slot=slot, tensor="t", role="node" if spec is None else "weight")
    return Decision(site=site, op="MatMul", spec=spec, reason=f"of {slot}")


def test_a_node_is_represented_by_its_first_decision_that_quantizes() -> None:
    spec = Spec(format=FORMATS.get("int8"))
    entries = (decision("a", "in2", None), decision("a", "in1", spec), decision("b", "", None))
    plan = Plan(decisions=entries, groups={}, target="portable", recipe_hash="r", model_hash="m")
    assert {name: d.site.slot for name, d in plan.nodes().items()} == {"a": "in1", "b": ""}
    assert plan.quantized() == [entries[1]]
    assert entries[1].site.index == 1
    assert plan.to_dict()["decisions"][0]["spec"] is None


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (Spec(format=FORMATS.get("uint8"), symmetric=False), "uint8 per tensor, asymmetric"),
        (Spec(format=FORMATS.get("int8"), granularity=per_channel(1)), "int8 per channel (axis 1), symmetric"),
        (Spec(format=FORMATS.get("int4"), granularity=per_block(0, 32)), "int4 blocks of 32 (axis 0), symmetric"),
        (Spec(format=FORMATS.get("int8"), reduce_bits=1), "int8 per tensor, symmetric, 7 bits"),
    ],
)
def test_a_spec_in_words(spec: Spec, text: str) -> None:
    assert spec_text(spec).startswith(text)
