"""The same model has the same hash however it is stored; another one is told apart, and how is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, parser
from qpipe.pipeline import graph


def build(weight: float = 1.0, text: str = "Relu(h)") -> ModelProto:
    proto = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 21, "my": 1]>
        g (float[N,64] x, bool c) => (float[N,64] y) <float[64] b = {{{", ".join(["2"] * 64)}}}> {{
            h = MatMul(x, w)
            r = {text}
            f = my.F(r, b)
            y = If (c) <then_branch = t () => (float[N,64] a) {{ a = Add(f, b) }},
                        else_branch = e () => (float[N,64] d) {{ d = Neg(f) }}>
        }}
        <domain: "my", opset_import: ["": 21]> F (p, q) => (s) {{ s = Mul(p, q) }}""")
    array = np.full((64, 64), 1, np.float32)
    array[-1, -1] = weight
    proto.graph.initializer.append(onnx.numpy_helper.from_array(array, "w"))
    return proto


def digest(proto: ModelProto) -> str:
    return graph.model_hash(graph.from_proto(proto))


def test_storage_and_notes_do_not_count(tmp_path: Path) -> None:
    model = graph.from_proto(build())
    expected = graph.model_hash(model)
    assert len(expected) == 64
    graph.save(model, tmp_path / "embedded.onnx")
    graph.save(model, tmp_path / "external.onnx", external_threshold=0)
    for name in ("embedded.onnx", "external.onnx"):
        assert graph.model_hash(tmp_path / name) == expected
        assert graph.model_hash(graph.load(tmp_path / name)) == expected
    noted = build()
    noted.producer_name, noted.doc_string, noted.ir_version = "someone", "notes", 9
    noted.metadata_props.add(key="k", value="v")
    noted.graph.value_info.append(onnx.helper.make_tensor_value_info("h", 1, ["N", 64]))
    noted.graph.node[0].doc_string = "multiplies"
    typed = noted.graph.initializer[0]
    array = onnx.numpy_helper.to_array(typed)
    typed.CopyFrom(onnx.helper.make_tensor("b", 1, [64], array.tobytes(), raw=True))
    noted.graph.initializer.sort(key=lambda tensor: tensor.name, reverse=True)
    assert digest(noted) == expected


def test_a_hash_is_of_the_model_as_it_was_when_it_was_begun() -> None:
    model = graph.from_proto(build())
    hashing, expected = graph.begin_hash(model), digest(build())
    model.graph.nodes.clear()
    assert (hashing(), hashing()) == (expected, expected)
    assert graph.model_hash(model) != expected


def changed_weight() -> ModelProto:
    return build(weight=1.0000001)


def changed_operator() -> ModelProto:
    return build(text="Neg(h)")


def changed_name() -> ModelProto:
    proto = build()
    proto.graph.node[0].name = "other"
    return proto


def changed_function() -> ModelProto:
    proto = build()
    proto.functions[0].node[0].op_type = "Add"
    return proto


def changed_branch() -> ModelProto:
    proto = build()
    proto.graph.node[3].attribute[1].g.node[0].op_type = "Abs"
    return proto


def changed_opset() -> ModelProto:
    proto = build()
    proto.opset_import[0].version = 22
    return proto


def changed_shape() -> ModelProto:
    proto = build()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    return proto


@pytest.mark.parametrize(
    "change",
    [
        changed_weight,
        changed_operator,
        changed_name,
        changed_function,
        changed_branch,
        changed_opset,
        changed_shape,
    ],
)
def test_what_the_model_computes_counts(change: object) -> None:
    assert digest(change()) != digest(build())


def test_topology_says_how_models_differ() -> None:
    one = graph.topology(graph.from_proto(build()))
    assert one.nodes == (
        ("MatMul_0", "MatMul"),
        ("Relu_0", "Relu"),
        ("F_0", "F"),
        ("If_0", "If"),
        ("Add_0", "Add"),
        ("Neg_0", "Neg"),
    )
    assert one.differences(graph.topology(graph.from_proto(changed_weight()))) == []
    other = graph.topology(graph.from_proto(build(text="Sigmoid(h)")))
    assert one.differences(other) == ["only in the first: Relu_0 (Relu)", "only in the second: Sigmoid_0 (Sigmoid)"]
    assert one.differences(other, limit=1) == ["only in the first: Relu_0 (Relu)", "and 1 more"]
    rewired = build()
    rewired.graph.node[1].input[0] = "x"
    assert one.differences(graph.topology(graph.from_proto(rewired))) == [
        "the same nodes, but connected in another way"
    ]


def test_queries() -> None:
    model = graph.from_proto(build())
    matmul, relu, call, branch = model.graph.nodes
    h, f = matmul.outputs[0], call.outputs[0]
    assert graph.producer(h) is matmul
    assert graph.producer(model.graph.inputs[0]) is None
    assert graph.producer(matmul.inputs[1]) is None
    assert graph.consumers(h) == [relu]
    inner = [node.name for node in graph.consumers(f)]
    assert inner == ["Add_0", "Neg_0"], "users inside branches count"
    square = graph.from_proto(build(text="Mul(h, h)")).graph.nodes[1]
    assert [node.name for node in graph.consumers(square.inputs[0])] == ["Mul_0"], "each user once"
    assert branch.op == "If"


def test_fresh_names_avoid_tensors_and_nodes_in_all_graphs() -> None:
    body = graph.from_proto(build()).graph
    assert graph.fresh_name(body, "new") == "new"
    assert graph.fresh_name(body, "w") == "w_1"
    assert graph.fresh_name(body, "d") == "d_1", "a tensor of a branch"
    assert graph.fresh_name(body, "Neg_0") == "Neg_0_1", "a node of a branch"
    assert graph.fresh_name(body, "x") == "x_1"
    body.nodes[0].outputs[0].name = "x_1"
    assert graph.fresh_name(body, "x") == "x_2"
