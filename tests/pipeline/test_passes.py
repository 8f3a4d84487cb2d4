"""Passes change the graph and not what it computes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import helper
from qpipe.pipeline import graph
from qpipe.pipeline.calibration import Calibration
from qpipe.pipeline.fresh import FreshNames
from qpipe.pipeline.ordering import sorted_nodes
from qpipe.pipeline.stages.prepare import prepare
from quantizing import error, model, normal, quantize, random_batches, run


def prepared(source: onnx.ModelProto) -> onnx.ModelProto:
    return graph.to_proto(prepare(graph.from_proto(source)))


def ops(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def same(source: onnx.ModelProto, tolerance: float = 1e-5) -> onnx.ModelProto:
    """Prepare, check that both compute the same, and return the result."""
    result = prepared(source)
    for batch in random_batches(source):
        for wanted, got in zip(run(source, batch), run(result, batch), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())
    return result


@pytest.mark.parametrize(
    ("attribute", "dtype"),
    [
        ("value_float=0.5", np.float32),
        ("value_floats=[0.5, 1.5]", np.float32),
        ("value=float[2] {1.0, 2.0}", np.float32),
    ],
)
def test_constants_become_initializers(attribute: str, dtype: type) -> None:
    result = same(model(f"g (float[N,2] x) => (float[N,2] y) {{ k = Constant<{attribute}>()  y = Mul(x, k) }}"))
    assert ops(result) == ["Mul"]
    assert onnx.numpy_helper.to_array(result.graph.initializer[0]).dtype == dtype


@pytest.mark.parametrize("attribute", ["value_int=2", "value_ints=[2, 1]"])
def test_whole_constants_become_initializers(attribute: str) -> None:
    result = same(model(f"g (int64[N,2] x) => (int64[N,2] y) {{ k = Constant<{attribute}>()  y = Mul(x, k) }}"))
    assert ops(result) == ["Mul"]


def test_a_constant_that_is_an_output_stays() -> None:
    body = "g (float[2] x) => (float[2] y, float[2] k) { k = Constant<value_floats=[0.5, 1.5]>() y = Mul(x, k) }"
    result = same(model(body))
    assert ops(result) == ["Constant", "Mul"]


def test_strings_stay_constants() -> None:
    source = model('g (float[1] x) => (float[1] y) { s = Constant<value_string="hi">()  y = Identity(x) }')
    assert "Identity" in ops(same(source))


def test_identity_and_dropout_vanish() -> None:
    body = "g (float[N,2] x) => (float[N,2] y) { a = Identity(x)  b = Dropout(a)  c = Tanh(b)  y = Identity(c) }"
    result = same(model(body))
    assert ops(result) == ["Tanh", "Identity"]


def test_a_dropout_that_trains_or_whose_mask_is_read_stays() -> None:
    training = model(
        "g (float[N,2] x, bool t) => (float[N,2] y) { b = Dropout(x, r, t)  y = Tanh(b) }",
        r=np.asarray(0.5, np.float32),
    )
    assert "Dropout" in ops(prepared(training))
    mask = model("g (float[N,2] x) => (float[N,2] y, bool[N,2] m) { b, m = Dropout(x)  y = Tanh(b) }")
    assert ops(same(mask)) == ["Dropout", "Tanh"]
    only_mask = model("g (float[N,2] x) => (float[N,2] y, bool[N,2] n) { b, m = Dropout(x)  n = Not(m)  y = Tanh(x) }")
    assert "Dropout" in ops(same(only_mask))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("op", "shape"),
    [
        ("Conv<pads=[1,1,1,1]>", (4, 3, 3, 3)),
        ("Conv<pads=[1,1,1,1], group=3>", (6, 1, 3, 3)),
        ("ConvTranspose", (3, 5, 2, 2)),
    ],
)
def test_batch_normalization_folds(op: str, shape: tuple[int, ...], bias: bool) -> None:
    out = shape[1] if op.startswith("ConvT") else shape[0]
    weights = {name: np.abs(normal(out, seed=i)) + 0.1 for i, name in enumerate(("s", "o", "m", "v"))}
    weights |= {"b": normal(out)} if bias else {}
    product = f"c = {op}(x, w{', b' if bias else ''})"
    text = f"g (float[N,3,5,5] x) => (float[N,{out},H,W] y) {{ {product}  y = BatchNormalization(c, s, o, m, v) }}"
    result = same(model(text, w=normal(*shape), **weights))
    assert len(ops(result)) == 1


def test_batch_normalization_folds_into_gemm() -> None:
    weights = {name: np.abs(normal(5, seed=i)) + 0.1 for i, name in enumerate(("s", "o", "m", "v"))}
    text = "g (float[N,4] x) => (float[N,5] y) { c = Gemm<transB=1>(x, w, b)  y = BatchNormalization(c, s, o, m, v) }"
    assert ops(same(model(text, w=normal(5, 4), b=normal(5), **weights))) == ["Gemm"]


@pytest.mark.parametrize(
    "text",
    [
        "c = Conv(x, w)  z = Tanh(c)  n = BatchNormalization(c, s, s, s, s)  y = Add(z, n)",
        "c = Conv(x, w)  n = BatchNormalization(c, s, s, s, s)  y = Add(n, c)",
        "c = Tanh(x)  y = BatchNormalization(c, s, s, s, s)",
        "c = ConvTranspose<group=2>(x, u)  y = BatchNormalization(c, s, s, s, s)",
    ],
)
def test_batch_normalization_stays_where_it_cannot_fold(text: str) -> None:
    used = {"w": normal(4, 4, 1, 1), "u": normal(4, 2, 1, 1)}
    weights = {name: array for name, array in used.items() if f", {name})" in text}
    body = f"g (float[N,4,3,3] x) => (float[N,4,3,3] y) {{ {text} }}"
    result = same(model(body, s=np.abs(normal(4)) + 0.1, **weights))
    assert "BatchNormalization" in ops(result)


def test_a_weight_of_two_convolutions_is_folded_into_one_only() -> None:
    text = """g (float[N,4,3,3] x) => (float[N,4,3,3] y, float[N,4,3,3] z) {
        c = Conv(x, w)  y = BatchNormalization(c, s, s, s, s)  z = Conv(x, w)
    }"""
    result = same(model(text, w=normal(4, 4, 1, 1), s=np.abs(normal(4)) + 0.1))
    assert ops(result) == ["Conv", "Conv"]


def test_a_normalization_in_a_body_does_not_fold_into_a_convolution_outside() -> None:
    source = model(
        """g (float[1,4,3,3] x, bool f) => (float[1,4,3,3] y) {
            c = Conv(x, w)
            y = If(f)<then_branch = t () => (float[1,4,3,3] a) { a = BatchNormalization(c, s, s, s, s) },
                      else_branch = e () => (float[1,4,3,3] b) { b = Relu(x) }>
        }""",
        w=normal(4, 4, 1, 1),
        s=np.abs(normal(4)) + 0.1,
    )
    assert ops(same(source)) == ["Conv", "If"]


EINSUM = [
    # equation, shape of x, shape of w, becomes a MatMul
    ("ij,jk->ik", (3, 4), (4, 5), True),
    ("ij,kj->ik", (3, 4), (5, 4), True),
    ("bsd,de->bse", (2, 3, 4), (4, 5), True),
    ("...d,de->...e", (2, 3, 4), (4, 5), True),
    ("bds,de->bse", (2, 4, 3), (4, 5), True),
    ("abc,cde->abde", (2, 3, 4), (4, 5, 6), True),
    ("abcd,cde->abe", (2, 3, 4, 5), (4, 5, 6), True),
    ("abcd,dce->abe", (2, 3, 4, 5), (5, 4, 6), True),
    ("bsd,dhe->bhse", (2, 3, 4), (4, 5, 6), True),
    ("bsd,ed", (2, 3, 4), (5, 4), True),
    ("bi,bj->bij", (3, 4), (3, 5), False),
    ("bij,bjk->bik", (2, 3, 4), (2, 4, 5), False),
    ("ij,jk->k", (3, 4), (4, 5), False),
    ("ii,ij->ij", (3, 3), (3, 5), False),
    ("ij,kl->ijkl", (2, 3), (4, 5), False),
    ("...ds,de->...se", (2, 4, 3), (4, 5), False),
]


@pytest.mark.parametrize(("equation", "x", "w", "becomes"), EINSUM)
@pytest.mark.parametrize("swapped", [False, True])
def test_einsum(equation: str, x: tuple[int, ...], w: tuple[int, ...], becomes: bool, swapped: bool) -> None:
    left, arrow, right = equation.partition("->")
    operands, names = left.split(","), ["x", "w"]
    if swapped:
        operands, names = operands[::-1], names[::-1]
    node = helper.make_node("Einsum", names, ["y"], name="product", equation=",".join(operands) + arrow + right)
    source = model("g (float[1] q) => (float[1] r) { r = Identity(q) }", w=normal(*w))
    source.graph.ClearField("node")
    source.graph.node.append(node)
    source.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", 1, x))
    rank = np.einsum(equation, np.zeros(x), np.zeros(w)).ndim
    source.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, [None] * rank))
    result = same(source)
    assert ("MatMul" in ops(result)) is becomes
    assert ("Einsum" in ops(result)) is not becomes
    if becomes:
        found = quantize(source)
        assert found.plan.nodes()["product"].spec is not None
        assert "w" not in found.initializers()
        assert error(found, random_batches(source, 1)[0]) < 0.05


def test_types_behind_an_unknown_operator_follow_from_its_readers() -> None:
    body = "g (float[N,4] x) => (float[N,4] y) { h = my.F(x)  m = MatMul(h, w)  y = my.F(m) }"
    source = model(body, domains='"my" : 1', w=normal(4, 4))
    done = prepare(graph.from_proto(source))
    tensors = done.graph.tensors()
    assert tensors["h"].dtype == tensors["m"].dtype == np.float32


def test_types_inside_bodies_are_inferred() -> None:
    source = model(
        """g (float[2,4] x, bool f) => (float[2,4] y) {
            y = If(f)<then_branch = t () => (float[2,4] a) { h = Tanh(x)  a = Exp(h) },
                      else_branch = e () => (float[2,4] b) { k = Relu(x)  b = Exp(k) }>
        }"""
    )
    done = prepare(graph.from_proto(source))
    assert all(t.dtype == np.float32 for inner in graph.all_graphs(done.graph) for n in inner.nodes for t in n.outputs)


def test_names_are_fresh_everywhere_and_found_in_linear_time() -> None:
    source = model(
        """g (float[2,4] x, bool a_1) => (float[2,4] y) {
            y = If(a_1)<then_branch = t () => (float[2,4] b) { a = Tanh(x)  b = Exp(a) },
                        else_branch = e () => (float[2,4] c) { c = Relu(x) }>
        }"""
    )
    names = FreshNames(graph.from_proto(source).graph)
    assert [names("a"), names("a"), names("z"), names("z")] == ["a_2", "a_3", "z", "z_1"]


def test_nodes_are_sorted_stably() -> None:
    source = model(
        "g (float[2] x) => (float[2] y) { a = Tanh(x)  b = Relu(x)  c = Add(a, b)  d = Exp(x)  y = Add(c, d) }"
    )
    inner = graph.from_proto(source).graph
    order = [node.name for node in inner.nodes]
    assert [node.name for node in sorted_nodes(inner)] == order
    inner.nodes = [*inner.nodes[2:], *inner.nodes[:2]]
    assert [node.name for node in sorted_nodes(inner)] == order
    assert isinstance(inner, gs.Graph)


def test_a_body_comes_after_what_it_reads() -> None:
    source = model(
        """g (float[2] x, bool f) => (float[2] y) {
            h = Tanh(x)
            y = If(f)<then_branch = t () => (float[2] a) { a = Exp(h) },
                      else_branch = e () => (float[2] b) { b = Relu(x) }>
        }"""
    )
    inner = graph.from_proto(source).graph
    inner.nodes = inner.nodes[::-1]
    assert [node.op for node in sorted_nodes(inner)] == ["Tanh", "If"]


ATTENTION = {
    "plain": ("x, w, b", ""),
    "causal": ("x, w, b", ", unidirectional=1, scale=0.3"),
    "sizes": ("x, w, b", ", qkv_hidden_sizes=[4,4,16]"),
    "keys": ("x, w, b, m2", ", mask_filter_value=-3.0"),
    "pairs": ("x, w, b, m3, , a", ""),
}
INPUTS = "float[2,5,8] x, int32[2,5] m2, int32[2,5,5] m3, float[1,2,5,5] a"


def attention(operands: str, attributes: str, opset: int = 17) -> onnx.ModelProto:
    width = 16 if "sizes" in attributes else 8
    given = ", ".join(entry for entry in INPUTS.split(", ") if entry.split()[1] in operands.split(", "))
    body = f"""g ({given}) => (float[2,5,{width}] y) {{
        y = com.microsoft.Attention<num_heads=2{attributes}>({operands})
    }}"""
    return model(body, opset=opset, ir=8, domains='"com.microsoft" : 1', w=normal(8, 24) / 3, b=normal(24) / 3)


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("case", ATTENTION)
def test_attention_of_onnxruntime_is_taken_apart(case: str, opset: int) -> None:
    assert ops(same(attention(*ATTENTION[case], opset))) == ["MatMul", "Split", "MultiHeadAttention"]


def test_masked_keys_stay_masked_when_attention_is_taken_apart() -> None:
    source = attention(*ATTENTION["keys"])
    batch = {"x": normal(2, 5, 8), "m2": np.int32([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])}
    np.testing.assert_allclose(run(prepared(source), batch)[0], run(source, batch)[0], rtol=1e-5, atol=1e-6)


def test_attention_that_is_not_taken_apart_says_why() -> None:
    body = """g (float[2,5,8] x, int32[n] mask, float[2,2,2,P,4] past) => (float[2,5,8] y, float[2,5,8] z) {
        y = com.microsoft.Attention<num_heads=2>(x, w, b, mask)
        z, present = com.microsoft.Attention<num_heads=2>(x, w, b, , past)
    }"""
    source = model(body, ir=8, domains='"com.microsoft" : 1', w=normal(8, 24), b=normal(24))
    found = quantize(source, calibration=Calibration(tensors={}))
    assert ops(found.proto) == ["Attention", "Attention"]
    assert "taken apart" in found.reason("Attention_0")
    assert "taken apart" in found.reason("Attention_1")
