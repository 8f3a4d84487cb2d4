"""First and last layers left in float on request: which they are, and that the rest is quantized."""

from __future__ import annotations

import onnx
import pytest
from qpipe.calibrate.errors import RecipeError
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.stages.ends import REASONS
from quantizing import calibrate, model, normal, quantize

CHAIN = """g (float[N,8] x) => (float[N,8] y) {
    a = MatMul(x, w1)
    b = Relu(a)
    c = MatMul(b, w2)
    d = Add(c, b)
    y = MatMul(d, w3)
}"""
BRANCHES = """g (float[N,8] x) => (float[N,N] s, float[N,8] y) {
    q = MatMul(x, w1)
    k = MatMul(x, w2)
    t = Transpose<perm = [1, 0]>(k)
    s = MatMul(q, t)
    y = MatMul(s2, w3)
    s2 = MatMul(s, x)
}"""


def chain() -> onnx.ModelProto:
    return model(CHAIN, **{f"w{i}": normal(8, 8, seed=i) for i in (1, 2, 3)})


def in_float(proto: onnx.ModelProto, *keep: str, **recipe: object) -> dict[str, str]:
    """Layers with a weight that stay in float, with the reason."""
    found = quantize(proto, calibration=calibrate(proto, [{"x": normal(8, 8)}]), keep=keep, **recipe)
    nodes = found.plan.nodes()
    return {n.name: nodes[n.name].reason for n in proto.graph.node if n.op_type == "MatMul" and not nodes[n.name].spec}


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w8"])
def test_ends_of_a_chain(scheme: str) -> None:
    assert in_float(chain(), scheme=scheme) == {}
    assert in_float(chain(), "first", scheme=scheme) == {"MatMul_0": REASONS["first"]}
    assert in_float(chain(), "last", scheme=scheme) == {"MatMul_4": REASONS["last"]}
    assert set(in_float(chain(), "first", "last", scheme=scheme)) == {"MatMul_0", "MatMul_4"}


def test_every_branch_has_a_first_layer_and_attention_is_no_layer() -> None:
    text = BRANCHES.replace(
        "    y = MatMul(s2, w3)\n    s2 = MatMul(s, x)\n", "    s2 = MatMul(s, x)\n    y = MatMul(s2, w3)\n"
    )
    proto = model(text, **{f"w{i}": normal(8, 8, seed=i) for i in (1, 2, 3)})
    first = [n for n, reason in in_float(proto, "first", scheme="w8").items() if reason == REASONS["first"]]
    assert first == ["MatMul_0", "MatMul_1"]
    last = [n for n, reason in in_float(proto, "last", scheme="w8").items() if reason == REASONS["last"]]
    assert last == ["MatMul_5"]


def test_a_node_that_runs_layers_counts_as_one() -> None:
    text = """g (float[N,8] x, bool c) => (float[N,8] y) {
        a = MatMul(x, w1)
        b = If(c) <
            then_branch = then_body () => (float[N,8] t) { t = MatMul(a, w2) },
            else_branch = else_body () => (float[N,8] e) { e = Identity(a) }
        >
        y = Relu(b)
    }"""
    proto = model(text, w1=normal(8, 8, seed=1), w2=normal(8, 8, seed=2))
    found = quantize(proto, scheme="w8", keep=["first"])
    assert found.reason("MatMul_0") == REASONS["first"]
    kept = quantize(proto, scheme="w8", keep=["last"])
    assert kept.plan.nodes()["MatMul_0"].spec is not None


def test_only_the_ends_can_be_kept() -> None:
    with pytest.raises(RecipeError, match="wrong value"):
        make_recipe(keep=["middle"])
