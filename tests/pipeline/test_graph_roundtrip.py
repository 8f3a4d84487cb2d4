"""What a file says survives import and export: drawn models, and one of each thing that graphsurgeon drops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from qpipe.calibrate.errors import ModelError
from qpipe.pipeline import graph

FLOAT = TensorProto.FLOAT


def model_of(nodes: list[NodeProto], **parts: object) -> ModelProto:
    body = helper.make_graph(
        nodes,
        "g",
        parts.pop("inputs", [helper.make_tensor_value_info("x", FLOAT, ["N", 3])]),
        parts.pop("outputs", [helper.make_tensor_value_info("y", FLOAT, ["N", 3])]),
        parts.pop("initializer", []),
        value_info=parts.pop("value_info", []),
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("my.domain", 7)]
    return helper.make_model(body, opset_imports=opsets, ir_version=parts.pop("ir_version", 10), **parts)


def normal(proto: ModelProto) -> str:
    """Order what has no order, and return the text."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    for repeated, key in ((copy.metadata_props, lambda e: e.key), (copy.opset_import, lambda e: e.domain)):
        ordered = sorted(repeated, key=key)
        del repeated[:]
        repeated.extend(ordered)
    for entry in copy.opset_import:
        entry.domain = entry.domain
    _normal_graph(copy.graph)
    return str(copy)


def _normal_graph(body: GraphProto) -> None:
    for repeated in (body.initializer, body.value_info):
        ordered = sorted(repeated, key=lambda entry: entry.name)
        del repeated[:]
        repeated.extend(ordered)
    for node in body.node:
        if not node.domain:
            node.ClearField("domain")
        ordered = sorted(node.attribute, key=lambda entry: entry.name)
        del node.attribute[:]
        node.attribute.extend(ordered)
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                _normal_graph(attribute.g)


def assert_kept(proto: ModelProto) -> None:
    before = proto.SerializeToString(deterministic=True)
    model = graph.from_proto(proto)
    assert proto.SerializeToString(deterministic=True) == before, "from_proto changed its argument"
    assert normal(graph.to_proto(model)) == normal(proto)
    assert normal(graph.to_proto(graph.clone(model))) == normal(proto)
    graph.check(model, after="loading")


@st.composite
def models(draw: st.DrawFn) -> ModelProto:
    """Draw a valid model of [N, 3] floats with shared values and constants, branches, functions and awkward names."""
    names = iter(range(10**6))
    fresh = lambda: f"v{next(names)}"  # noqa: E731
    function = parser.parse_function('<domain: "my.domain", opset_import: ["": 21]> f (a, b) => (c) { c = Mul(a, b) }')

    def constant() -> TensorProto:
        shape = draw(st.sampled_from([(), (3,), (1, 3)]))
        array = np.asarray(draw(st.lists(st.floats(-8, 8, width=32), min_size=3, max_size=3)), np.float32)
        return numpy_helper.from_array(array.reshape(-1)[: int(np.prod(shape))].reshape(shape), fresh())

    def grow(known: list[str], count: int, depth: int) -> tuple[list[NodeProto], list[TensorProto], str]:
        nodes: list[NodeProto] = []
        constants: list[TensorProto] = []
        local = list(known)
        for _ in range(count):
            kind = draw(st.sampled_from(["Relu", "Add", "constant", "f", "If" if depth else "Neg"]))
            out = fresh()
            name = draw(st.sampled_from(["", "same", "a b/ü", out]))
            pick = lambda: draw(st.sampled_from(local))  # noqa: E731
            if kind == "constant":
                constants.append(constant())
                nodes.append(helper.make_node("Mul", [pick(), constants[-1].name], [out], name=name))
            elif kind == "f":
                nodes.append(helper.make_node("f", [pick(), pick()], [out], name=name, domain="my.domain"))
            elif kind == "If":
                branches = {}
                for key in ("then_branch", "else_branch"):
                    inner, held, last = grow(local, draw(st.integers(1, 2)), depth - 1)
                    result = helper.make_tensor_value_info(last, FLOAT, None)
                    branches[key] = helper.make_graph(inner, key, [], [result], held)
                nodes.append(helper.make_node("If", ["c"], [out], name=name, **branches))
            else:
                arity = 2 if kind == "Add" else 1
                nodes.append(helper.make_node(kind, [pick() for _ in range(arity)], [out], name=name))
            local.append(out)
        return nodes, constants, local[-1]

    nodes, constants, last = grow(["x"], draw(st.integers(1, 6)), 2)
    notes = draw(st.dictionaries(st.text(min_size=1, max_size=5), st.text(max_size=5), max_size=3))
    known = [helper.make_tensor_value_info(node.output[0], FLOAT, ["N", 3]) for node in nodes[:-1]]
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    proto = model_of(
        nodes,
        inputs=[helper.make_tensor_value_info("x", FLOAT, ["N", 3]), condition],
        outputs=[helper.make_tensor_value_info(last, FLOAT, ["N", 3])],
        initializer=constants,
        value_info=draw(st.sampled_from([[], known])),
        functions=[function],
        producer_name=draw(st.sampled_from(["", "torch"])),
        doc_string=draw(st.sampled_from(["", "notes"])),
    )
    helper.set_model_props(proto, notes)
    onnx.checker.check_model(proto)
    return proto


@given(models())
@settings(max_examples=60, deadline=None)
def test_drawn_models_survive(proto: ModelProto) -> None:
    assert_kept(proto)


@given(models())
@settings(max_examples=15, deadline=None)
def test_saved_models_survive(tmp_path_factory: pytest.TempPathFactory, proto: ModelProto) -> None:
    folder = tmp_path_factory.mktemp("saved")
    model = graph.from_proto(proto)
    graph.save(model, folder / "a.onnx")
    again = graph.load(folder / "a.onnx")
    graph.save(again, folder / "b.onnx")
    assert (folder / "a.onnx").read_bytes() == (folder / "b.onnx").read_bytes()
    assert normal(onnx.load(folder / "a.onnx")) == normal(proto)
    assert graph.model_hash(again) == graph.model_hash(model) == graph.model_hash(folder / "a.onnx")


@given(models())
@settings(max_examples=25, deadline=None)
def test_nodes_get_names_of_their_own(proto: ModelProto) -> None:
    model = graph.from_proto(proto)
    names = [node.name for inner in graph.all_graphs(model.graph) for node in inner.nodes]
    assert all(names)
    assert len(set(names)) == len(names)


def test_a_clone_is_independent_and_keeps_internal_names() -> None:
    names = ("h1", "h2", "y")
    nodes = [helper.make_node("Relu", [before], [after]) for before, after in zip(("x", *names), names, strict=False)]
    model = graph.from_proto(model_of(nodes))
    first = model.graph.nodes.pop(0)
    model.graph.nodes[0].inputs[0] = first.inputs[0]
    copy = graph.clone(model)
    assert [node.name for node in copy.graph.nodes] == ["Relu_1", "Relu_2"]
    copy.graph.nodes[0].op = "Neg"
    copy.metadata["k"] = "v"
    assert model.graph.nodes[0].op == "Relu"
    assert model.metadata == {}
    assert [node.name for node in graph.to_proto(copy).graph.node] == ["", ""]


def test_a_renamed_node_keeps_its_new_name() -> None:
    model = graph.from_proto(model_of([helper.make_node("Relu", ["x"], ["y"])]))
    assert graph.to_proto(model).graph.node[0].name == ""
    model.graph.nodes[0].name = "mine"
    assert graph.to_proto(model).graph.node[0].name == "mine"


ODD_ATTRIBUTES = [
    AttributeProto(name="empty_ints", type=AttributeProto.INTS),
    AttributeProto(name="empty_floats", type=AttributeProto.FLOATS),
    AttributeProto(name="empty_strings", type=AttributeProto.STRINGS),
    AttributeProto(name="binary", type=AttributeProto.STRING, s=b"\xff\xfe\0plugin"),
    AttributeProto(name="text", type=AttributeProto.STRING, s="ü".encode()),
    AttributeProto(name="binaries", type=AttributeProto.STRINGS, strings=[b"\xff", b"ok"]),
    AttributeProto(name="kind", type=AttributeProto.TYPE_PROTO, tp=helper.make_tensor_type_proto(FLOAT, [1, "n"])),
    AttributeProto(name="documented", type=AttributeProto.INT, i=3, doc_string="why"),
    AttributeProto(name="integral", type=AttributeProto.FLOATS, floats=[1.0, 2.0]),
    helper.make_attribute("zero", 0.0),
    helper.make_attribute("tensor", numpy_helper.from_array(np.arange(3), "t")),
    AttributeProto(
        name="tensors", type=AttributeProto.TENSORS, tensors=[numpy_helper.from_array(np.arange(3), "t")] * 2
    ),
]


@pytest.mark.parametrize("attribute", ODD_ATTRIBUTES, ids=lambda attribute: attribute.name)
def test_attributes_survive(attribute: AttributeProto) -> None:
    node = helper.make_node("Op", ["x"], ["y"], domain="my.domain")
    node.attribute.append(attribute)
    assert_kept(model_of([node]))


def test_an_empty_list_made_by_a_pass_gets_the_type_of_the_schema() -> None:
    model = graph.from_proto(model_of([helper.make_node("Flatten", ["x"], ["y"])]))
    node = model.graph.nodes[0]
    node.op, node.attrs = "StringNormalizer", {"stopwords": []}
    assert graph.to_proto(model).graph.node[0].attribute[0].type == AttributeProto.STRINGS
    node.op, node.attrs = "Squeeze", {"unknown": []}
    assert graph.to_proto(model).graph.node[0].attribute[0].type == AttributeProto.INTS


def test_documentation_and_metadata_survive() -> None:
    node = helper.make_node("Relu", ["x"], ["h"], name="n", doc_string="first", overload="")
    node.metadata_props.add(key="k", value="v")
    known = helper.make_tensor_value_info("h", FLOAT, ["N", 3], "documented")
    known.metadata_props.add(key="a", value="b")
    known.type.denotation = "IMAGE"
    known.type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    proto = model_of([node, helper.make_node("Relu", ["h"], ["y"])], value_info=[known])
    proto.graph.metadata_props.add(key="g", value="h")
    proto.graph.doc_string = "graph"
    proto.graph.input[0].doc_string = "input"
    annotation = proto.graph.quantization_annotation.add(tensor_name="h")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    proto.domain, proto.model_version, proto.producer_version = "d", 5, "1"
    assert_kept(proto)


def test_a_changed_shape_keeps_its_denotation() -> None:
    known = helper.make_tensor_value_info("h", FLOAT, ["N", 3])
    known.type.denotation = "IMAGE"
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    model = graph.from_proto(model_of(nodes, value_info=[known]))
    tensor = model.graph.nodes[0].outputs[0]
    tensor.shape, tensor.dtype = ["N", 4], np.dtype(np.float16)
    written = graph.to_proto(model).graph.value_info[0].type
    assert written.denotation == "IMAGE"
    assert written.tensor_type.elem_type == TensorProto.FLOAT16
    assert [dim.dim_param or dim.dim_value for dim in written.tensor_type.shape.dim] == ["N", 4]


def test_types_that_are_no_tensors_survive() -> None:
    nodes = [
        helper.make_node("SequenceConstruct", ["x", "x"], ["s"]),
        helper.make_node("Optional", ["s"], ["o"]),
        helper.make_node("OptionalGetElement", ["o"], ["t"]),
        helper.make_node("ConcatFromSequence", ["t"], ["y"], axis=0),
    ]
    tensor = helper.make_tensor_type_proto(FLOAT, ["N", 3])
    sequence = helper.make_sequence_type_proto(tensor)
    optional = helper.make_optional_type_proto(sequence)
    known = [helper.make_value_info("s", sequence), helper.make_value_info("o", optional)]
    outputs = [helper.make_tensor_value_info("y", FLOAT, ["N", 3]), helper.make_value_info("o", optional)]
    assert_kept(model_of(nodes, value_info=known[:1], outputs=outputs))


def test_map_types_and_text_survive() -> None:
    mapped = helper.make_value_info(
        "y", helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(FLOAT, []))
    )
    words = helper.make_tensor("words", TensorProto.STRING, [2], [b"one", "zwölf".encode()])
    node = helper.make_node("Op", ["x", "words"], ["y"], domain="my.domain")
    assert_kept(model_of([node], outputs=[mapped], initializer=[words]))


def test_inputs_with_default_values_survive_and_old_formats_list_all() -> None:
    weight = numpy_helper.from_array(np.ones(3, np.float32), "w")
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    inputs = [helper.make_tensor_value_info(name, FLOAT, [3]) for name in ("x", "w")]
    assert_kept(model_of(nodes, inputs=inputs, initializer=[weight]))
    old = model_of(nodes, inputs=inputs, initializer=[weight], ir_version=3)
    assert_kept(old)
    model = graph.from_proto(old)
    model.graph.nodes[0].inputs[1] = graph.constant("other", np.ones(3, np.float32))
    assert [entry.name for entry in graph.to_proto(model).graph.input] == ["x", "other"]


def test_constants_and_inputs_that_are_outputs_survive() -> None:
    weight = numpy_helper.from_array(np.ones((2, 3), np.float32), "w")
    outputs = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in (("y", ["N", 3]), ("w", [2, 3]))]
    outputs.append(helper.make_tensor_value_info("x", FLOAT, ["N", 3]))
    assert_kept(model_of([helper.make_node("Relu", ["x"], ["y"])], outputs=outputs, initializer=[weight]))


def test_sparse_initializers_survive_and_can_be_read() -> None:
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([1.5, -2], np.float32), "w"),
        numpy_helper.from_array(np.array([[0, 1], [1, 2]], np.int64), "indices"),
        [2, 3],
    )
    proto = model_of([helper.make_node("Add", ["x", "w"], ["y"])])
    proto.graph.sparse_initializer.append(sparse)
    assert_kept(proto)
    tensor = graph.from_proto(proto).graph.nodes[0].inputs[1]
    assert graph.values(tensor).tolist() == [[0, 1.5, 0], [0, 0, -2]]
    sparse.indices.raw_data = np.array([[0, 1], [1, 3]], np.int64).tobytes()
    proto.graph.sparse_initializer[0].CopyFrom(sparse)
    with pytest.raises(ModelError, match="outside its dimensions"):
        graph.values(graph.from_proto(proto).graph.nodes[0].inputs[1])


def test_a_constant_shared_by_branches_is_written_once() -> None:
    proto = parser.parse_model("""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,3] x, bool c) => (float[N,3] y)
        <float[3] shared = {1, 2, 3}, float[3] single = {4, 5, 6}> {
            y = If (c) <
                then_branch = t () => (float[N,3] a) { h = Add(x, shared)  a = Mul(h, single) },
                else_branch = e () => (float[N,3] b) { b = Mul(x, shared) }
            >
        }""")
    onnx.checker.check_model(proto)
    written = graph.to_proto(graph.from_proto(proto))
    onnx.checker.check_model(written)
    assert [tensor.name for tensor in written.graph.initializer] == ["shared"]
    branches = {attribute.name: attribute.g for attribute in written.graph.node[0].attribute}
    assert [tensor.name for tensor in branches["then_branch"].initializer] == ["single"]
    assert not branches["else_branch"].initializer
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for c in (True, False):
        runs = [ReferenceEvaluator(p).run(None, {"x": x, "c": np.array(c)})[0] for p in (proto, written)]
        np.testing.assert_array_equal(*runs)


def test_loops_and_their_carried_values_survive() -> None:
    assert_kept(
        parser.parse_model("""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,3] x, int64 n, bool go) => (float[N,3] y, float[K,N,3] all)
        <float[3] w = {1, 2, 3}> {
            h = Relu(x)
            y, all = Loop (n, go, h) <body = b (int64 i, bool c, float[N,3] carried)
                => (bool c2, float[N,3] next, float[N,3] out) <float[3] v = {3, 2, 1}> {
                c2 = Identity(c)  next = Add(carried, v)  out = Mul(next, h)
            }>
            unused = Add(h, w)
        }""")
    )


def test_raising_the_opset_is_one_assignment() -> None:
    model = graph.from_proto(model_of([helper.make_node("Relu", ["x"], ["y"])]))
    model.opset = 23
    assert {entry.domain: entry.version for entry in graph.to_proto(model).opset_import} == {"": 23, "my.domain": 7}


def test_a_new_domain_is_imported() -> None:
    model = graph.from_proto(model_of([helper.make_node("Relu", ["x"], ["y"])]))
    model.graph.nodes[0].domain = "com.microsoft"
    assert graph.to_proto(model).opset_import[1] == helper.make_opsetid("com.microsoft", 1)


def test_functions_with_weights_survive_in_data_files(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(40, 40)).astype(np.float32), "w")
    function = helper.make_function(
        "my.domain",
        "f",
        ["a"],
        ["c"],
        [helper.make_node("Constant", [], ["w"], value=weight), helper.make_node("MatMul", ["a", "w"], ["c"])],
        [helper.make_opsetid("", 21)],
    )
    node = helper.make_node("f", ["x"], ["y"], domain="my.domain")
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["N", 40])]
    proto = model_of([node], functions=[function], inputs=inputs)
    data = tmp_path / "model.data"
    data.write_bytes(weight.raw_data)
    outside = ModelProto()
    outside.CopyFrom(proto)
    tensor = outside.functions[0].node[0].attribute[0].t
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=data.name)
    (tmp_path / "model.onnx").write_bytes(outside.SerializeToString())
    model = graph.load(tmp_path / "model.onnx")
    assert normal(graph.to_proto(model)) == normal(proto)
    graph.save(model, tmp_path / "again.onnx", external_threshold=0)
    assert normal(onnx.load(tmp_path / "again.onnx")) == normal(proto)
    assert graph.model_hash(tmp_path / "model.onnx") == graph.model_hash(tmp_path / "again.onnx")


def test_a_message_with_external_data_is_refused() -> None:
    proto = model_of(
        [helper.make_node("Add", ["x", "w"], ["y"])], initializer=[numpy_helper.from_array(np.ones(3, np.float32), "w")]
    )
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(ModelError, match="'w' refers to external data"):
        graph.from_proto(proto)


SHIPPED = sorted((Path(onnx.__file__).parent / "backend" / "test" / "data").glob("*/*/model.onnx"))


def test_the_models_that_ship_with_onnx_survive() -> None:
    assert len(SHIPPED) > 100
    for path in SHIPPED:
        proto = onnx.load(path)
        assert normal(graph.to_proto(graph.load(path))) == normal(proto), path
        assert_kept(proto)
