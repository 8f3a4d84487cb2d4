"""Opsets and IR versions: what is raised, converted, lowered, and refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from qpipe.calibrate.errors import ModelError, UnsupportedError
from qpipe.pipeline import graph
from qpipe.pipeline.calibration import Calibration
from qpipe.pipeline.stages.lower import IR_OF_OPSET, runs_on_target
from qpipe.pipeline.stages.prepare import require_opset
from qpipe.pipeline.stages.upgrade import move_opset, upgrade
from qpipe.pipeline.targets import TARGETS
from quantizing import Result, calibrate, error, model, normal, quantize, random_batches, run, signature

NEWEST = onnx.defs.onnx_opset_version()
NET = "g (float[2,3,6,6] x) => (float[2,5] y) { c = Conv(x, w, b)  r = Relu(c)  f = Flatten(r)  y = Gemm(f, wg, bg) }"
WEIGHTS = {"w": normal(4, 3, 3, 3), "b": normal(4), "wg": normal(64, 5), "bg": normal(5)}


def old(body: str, opset: int, ir: int = 3, **weights: Any) -> onnx.ModelProto:
    """A model as it was written then: before IR version 4, weights are listed as inputs."""
    proto = model(body, opset=opset, ir=ir, **weights)
    if ir < 4:
        for tensor in proto.graph.initializer:
            proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return proto


def versions(found: Result) -> tuple[int, int]:
    return found.proto.opset_import[0].version, found.proto.ir_version


def equal(source: onnx.ModelProto, result: onnx.ModelProto) -> None:
    for batch in random_batches(source):
        for wanted, got in zip(run(source, batch), run(result, batch), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opset", range(10, 26))
def test_the_opset_of_the_model_stays(opset: int) -> None:
    source = model(NET, opset=opset, ir=6 if opset < 13 else 8, **WEIGHTS)
    found = quantize(source)
    assert versions(found)[0] == opset
    assert versions(found)[1] >= max(ir for since, ir in IR_OF_OPSET.items() if since <= opset)
    assert signature(found.proto) == signature(source)
    assert error(found, random_batches(source, 1)[0]) < 0.1
    is_per_channel = any(len(a) > 1 for name, a in found.initializers().items() if name.endswith("w_scale") and a.shape)
    assert is_per_channel is (opset >= 13)


@pytest.mark.parametrize("opset", [7, 8, 9])
def test_before_opset_10_the_remedy_is_named_and_works(opset: int) -> None:
    source = old(NET, opset, **WEIGHTS)
    loaded = graph.from_proto(source)
    with pytest.raises(ModelError, match=f"opset {opset} has no QuantizeLinear") as caught:
        require_opset(loaded)
    assert "--upgrade" in str(caught.value.do)
    converted = upgrade(graph.from_proto(source))
    assert converted.opset == 17
    proto = graph.to_proto(converted)
    assert [entry.name for entry in proto.graph.input] == ["x"]
    equal(source, proto)
    found = quantize(proto)
    assert {d.op for d in found.plan.nodes().values() if d.spec is not None} == {"Conv", "Relu", "Flatten", "Gemm"}


def test_models_that_carry_scales_per_channel_are_not_upgraded() -> None:
    loaded = graph.from_proto(model(NET, opset=13, ir=7, **WEIGHTS))
    assert upgrade(loaded) is loaded


@pytest.mark.parametrize("ir", [3, 4, 8])
def test_weights_that_are_listed_as_inputs(ir: int) -> None:
    source = model(NET, opset=11, ir=ir, **WEIGHTS)
    for tensor in source.graph.initializer:
        source.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    found = quantize(source)
    assert len(found.plan.quantized()) > 3
    assert not {"w", "wg"} & {entry.name for entry in found.proto.graph.input}
    assert signature(found.proto) == signature(source)
    assert error(found, random_batches(source, 1)[0]) < 0.1


def test_the_old_format_loses_its_list_of_weights_but_no_input() -> None:
    source = old(
        "g (float[2,4] x) => (float[2,4] y) { h = MatMul(x, w)  y = Mul(h, k) }", 10, w=normal(4, 4), k=normal(4)
    )
    found = quantize(source)
    assert versions(found)[1] >= 4
    assert [entry.name for entry in found.proto.graph.input] == ["x"]


OLD_OPERATORS = {
    "Softmax": (12, "g (float[2,3,4] x) => (float[2,3,4] y) { y = Softmax<axis=1>(x) }", {}),
    "Squeeze": (12, "g (float[2,1,4] x) => (float[2,4] y) { y = Squeeze<axes=[1]>(x) }", {}),
    "Unsqueeze": (12, "g (float[2,4] x) => (float[2,1,4] y) { y = Unsqueeze<axes=[1]>(x) }", {}),
    "ReduceSum": (12, "g (float[2,3,4] x) => (float[2,1,4] y) { y = ReduceSum<axes=[1]>(x) }", {}),
    "Split": (12, "g (float[4,4] x) => (float[2,4] y, float[2,4] z) { y, z = Split<axis=0>(x) }", {}),
    "Clip": (10, "g (float[2,4] x) => (float[2,4] y) { y = Clip<min=-0.5, max=0.5>(x) }", {}),
    "Pad": (10, "g (float[2,4] x) => (float[2,6] y) { y = Pad<pads=[0,1,0,1]>(x) }", {}),
    "Dropout": (10, "g (float[2,4] x) => (float[2,4] y) { y = Dropout<ratio=0.5>(x) }", {}),
    "Slice": (9, "g (float[4,4] x) => (float[2,4] y) { y = Slice<axes=[0], starts=[1], ends=[3]>(x) }", {}),
    "TopK": (9, "g (float[2,4] x) => (float[2,2] y, int64[2,2] i) { y, i = TopK<k=2>(x) }", {}),
    "Upsample nearest": (
        9,
        'g (float[1,2,4,4] x) => (float[1,2,8,8] y) { y = Upsample<mode="nearest">(x, s) }',
        {"s": np.float32([1, 1, 2, 2])},
    ),
    "Upsample linear": (
        9,
        'g (float[1,2,4,4] x) => (float[1,2,8,8] y) { y = Upsample<mode="linear">(x, s) }',
        {"s": np.float32([1, 1, 2, 2])},
    ),
    "Resize linear": (
        10,
        'g (float[1,2,4,4] x) => (float[1,2,8,8] y) { y = Resize<mode="linear">(x, s) }',
        {"s": np.float32([1, 1, 2, 2])},
    ),
    "BatchNormalization": (
        8,
        "g (float[1,2,4,4] x) => (float[1,2,4,4] y) { y = BatchNormalization(x, s, s, s, s) }",
        {"s": np.abs(normal(2)) + 0.1},
    ),
}


@pytest.mark.parametrize("name", OLD_OPERATORS)
def test_old_operators_compute_the_same_after_an_upgrade(name: str) -> None:
    opset, body, weights = OLD_OPERATORS[name]
    source = old(body, opset, **weights)
    result = graph.to_proto(upgrade(graph.from_proto(source)))
    onnx.checker.check_model(result, full_check=True)
    equal(source, result)


def test_bodies_are_converted_and_their_names_stay_apart() -> None:
    source = model(
        """g (float[2,4] x, bool f) => (float[2,1] y) {
            h = ReduceMean<axes=[1]>(x)
            y = If(f)<then_branch = t () => (float[2,1] a) { k = ReduceMean<axes=[1]>(x)  a = Add(h, k) },
                      else_branch = e () => (float[2,1] b) { b = ReduceMax<axes=[1]>(x) }>
        }""",
        opset=13,
    )
    result = graph.to_proto(move_opset(graph.from_proto(source), 21))
    onnx.checker.check_model(result, full_check=True)
    assert [node.name for node in result.graph.node if node.name] == [node.name for node in source.graph.node]
    for flag in (True, False):
        batch = {"x": normal(2, 4), "f": np.array(flag)}
        np.testing.assert_array_equal(run(source, batch)[0], run(result, batch)[0])


def test_a_number_alone_changes_where_no_operator_does() -> None:
    source = model("g (float[2,4] x) => (float[2,4] y) { y = Tanh(x) }", opset=13)
    source.graph.node[0].doc_string = "kept only when nothing is converted"
    result = graph.to_proto(move_opset(graph.from_proto(source), 21))
    assert result.opset_import[0].version == 21
    assert result.graph.node[0].doc_string == source.graph.node[0].doc_string


def functions(opset: int, body: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : {opset}, "my" : 1]>
        g (float[2,4] x) => (float[2,4] y) {{ y = my.F(x) }}
        <domain: "my", opset_import: ["" : {opset}]> F (a) => (b) {{ {body} }}"""
    )


def test_functions_come_along_unless_their_operators_changed() -> None:
    result = graph.to_proto(move_opset(graph.from_proto(functions(13, "b = Tanh(a)")), 21))
    assert [entry.version for entry in result.functions[0].opset_import] == [21]
    onnx.checker.check_model(result)
    changed = functions(13, "m = ReduceMean<axes=[1]>(a)  b = Add(a, m)")
    with pytest.raises(UnsupportedError, match="from opset 13 to 21") as caught:
        move_opset(graph.from_proto(changed), 21)
    assert "ReduceMean" in str(caught.value.found)


def test_types_that_need_a_higher_opset_raise_it_and_convert_the_model() -> None:
    body = "g (float[2,4] x) => (float[2,1] y) { h = MatMul(x, w)  y = ReduceMean<axes=[1]>(h) }"
    source = model(body, opset=13, ir=7, w=normal(4, 4))
    found = quantize(source, weights={"format": "int16"}, activations={"format": "uint16"}, target="portable")
    assert versions(found) == (21, 10)
    assert found.plan.nodes()["MatMul_0"].spec is not None
    assert error(found, random_batches(source, 1)[0]) < 1e-3


def statistics(source: onnx.ModelProto, **older: int) -> Calibration:
    """Statistics of the model at versions that this ONNX Runtime runs."""
    runnable = onnx.ModelProto()
    runnable.CopyFrom(source)
    runnable.opset_import[0].version = older.get("opset", source.opset_import[0].version)
    runnable.ir_version = older.get("ir", source.ir_version)
    return calibrate(runnable, random_batches(source))


@pytest.mark.parametrize("opset", [26, NEWEST])
def test_an_opset_that_the_target_has_no_kernels_for_is_lowered(opset: int) -> None:
    source = model("g (float[2,4] x) => (float[2,4] y) { y = MatMul(x, w) }", opset=opset, w=normal(4, 4))
    found = quantize(source, calibration=statistics(source, opset=25))
    assert versions(found)[0] == 25
    run(found.proto, random_batches(source)[0])


def test_the_interface_stays_when_operators_are_converted() -> None:
    """The converter gives free dimensions names."""
    source = model("g (float[2,4] x) => (float[N] y) { h = MatMul(x, w)  y = Unique(h) }", opset=NEWEST, w=normal(4, 4))
    source.graph.output[0].type.tensor_type.shape.dim[0].Clear()
    found = quantize(source, calibration=statistics(source, opset=25))
    assert versions(found)[0] == 25
    assert signature(found.proto) == signature(source)


def test_an_opset_that_cannot_be_lowered_stays_and_is_said() -> None:
    """Inside a function an operator that changed cannot be converted."""
    assert onnx.defs.get_schema("QuantizeLinear").since_version > TARGETS.get("ort-cpu").opset_ceiling
    source = functions(NEWEST, "s = Constant<value_float=0.1>()  q = QuantizeLinear(a, s)  b = DequantizeLinear(q, s)")
    found = quantize(source, scheme="float")
    assert versions(found)[0] == NEWEST
    assert not runs_on_target(found.result.model, "ort-cpu")
    assert f"opset {NEWEST} stays, beyond what ort-cpu has kernels for" in found.result.notes[-1]


def test_the_ir_version_is_what_the_content_needs() -> None:
    source = model("g (float[2,4] x) => (float[2,4] y) { y = MatMul(x, w) }", opset=17, w=normal(4, 4))
    source.ir_version = max(IR_OF_OPSET.values()) + 1
    assert versions(quantize(source, calibration=statistics(source, ir=8)))[1] == 8
