"""Constants of every type: packed as ONNX says, accepted by the checker, read back as they were."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from qpipe.pipeline import graph
from qpipe.pipeline.graph.constants import Values
from qpipe.pipeline.graph.protos import byte_size

BITS = {
    "INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT8": 8, "UINT8": 8, "BOOL": 8,
    "FLOAT8E4M3FN": 8, "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2": 8, "FLOAT8E5M2FNUZ": 8, "FLOAT8E8M0": 8,
    "INT16": 16, "UINT16": 16, "FLOAT16": 16, "BFLOAT16": 16, "INT32": 32, "FLOAT": 32, "INT64": 64, "DOUBLE": 64,
}  # fmt: skip


def every_code(onnx_type: str) -> np.ndarray:
    """Return an array with every code of a type up to 16 bits, or with random bits of a wider one."""
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(onnx_type)))
    bits = BITS[onnx_type]
    if onnx_type == "BOOL":
        return np.array([True, False, True])
    if bits > 16:
        return np.random.default_rng(0).integers(0, 256, 40 * bits, np.uint8).view(dtype)
    if bits < 8:
        signed = ml_dtypes.int4 if onnx_type == "INT4" else ml_dtypes.int2 if onnx_type == "INT2" else None
        codes = np.arange(2**bits, dtype=np.uint8)
        return (codes.astype(np.int8) - 2 ** (bits - 1)).astype(signed) if signed else codes.view(dtype)
    return np.arange(2**bits, dtype=f"u{bits // 8}").view(dtype)


def bits_of(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def holding(constant: gs.Constant) -> graph.Model:
    """Return a model that gives its constant out."""
    model = graph.from_proto(
        helper.make_model(
            helper.make_graph([], "g", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])]),
            opset_imports=[helper.make_opsetid("", 25)],
            ir_version=13,
        )
    )
    model.graph.outputs = [constant]
    return model


@pytest.mark.parametrize("place", ["memory", "embedded", "external"])
@pytest.mark.parametrize("onnx_type", BITS)
def test_every_type_comes_back_bit_for_bit(tmp_path: Path, onnx_type: str, place: str) -> None:
    array = np.resize(every_code(onnx_type), (5, 7, 60))
    made = graph.constant("c", array, onnx_type)
    assert graph.stored_size(made) == (array.size * BITS[onnx_type] + 7) // 8
    model = holding(made)
    if place != "memory":
        graph.save(model, tmp_path / "m.onnx", external_threshold=0 if place == "external" else None)
        onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
        model = graph.load(tmp_path / "m.onnx")
        again = numpy_helper.to_array(onnx.load(tmp_path / "m.onnx").graph.initializer[0])
        assert bits_of(again) == bits_of(array)
    graph.check(model, after="test")
    (found,) = model.graph.outputs
    values = graph.values(found)
    assert values.dtype == found.dtype == array.dtype
    assert values.shape == tuple(found.shape) == array.shape
    assert bits_of(values) == bits_of(array)
    assert isinstance(found._values, Values), "the values must not stay in the graph"
    proto = graph.to_proto(model)
    assert proto.graph.initializer[0].data_type == TensorProto.DataType.Value(onnx_type)
    assert proto.graph.output[0].type.tensor_type.elem_type == TensorProto.DataType.Value(onnx_type)
    assert len(proto.graph.initializer[0].raw_data) == graph.stored_size(made)


@given(
    onnx_type=st.sampled_from(["INT2", "UINT2", "INT4", "UINT4", "FLOAT4E2M1", "FLOAT8E4M3FN", "BFLOAT16"]),
    shape=st.lists(st.integers(0, 5), max_size=3),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_any_shape_packs_and_unpacks(onnx_type: str, shape: list[int], data: st.DataObject) -> None:
    count = int(np.prod(shape))
    picks = data.draw(st.lists(st.integers(0, 2 ** BITS[onnx_type] - 1), min_size=count, max_size=count))
    array = every_code(onnx_type)[np.array(picks, dtype=int)].reshape(shape)
    made = graph.constant("c", array, onnx_type)
    packed = b"".join(bytes(chunk) for chunk in made._values.chunks())
    assert len(packed) == byte_size(TensorProto.DataType.Value(onnx_type), shape)
    assert bits_of(graph.values(made)) == bits_of(array)
    lazily = graph.constant("c", graph.Lazy(array.shape, array.dtype, lambda: array.__getitem__), onnx_type)
    assert b"".join(bytes(chunk) for chunk in lazily._values.chunks()) == packed
    assert bits_of(graph.values(lazily)) == bits_of(array)
    assert graph.stored_size(lazily) == graph.stored_size(made)


def test_values_are_cast_to_the_type_that_is_asked_for() -> None:
    made = graph.constant("c", [-8, -1, 7], "INT4")
    assert made.dtype == ml_dtypes.int4
    assert graph.values(made).astype(int).tolist() == [-8, -1, 7]
    assert made._values.tensor.raw_data == bytes([0xF8, 0x07])
    assert graph.values(graph.constant("c", 2.5)).shape == ()
    assert graph.constant("c", 2.5, TensorProto.FLOAT16).dtype == np.float16


def test_constants_of_graphsurgeon_itself_are_written_right() -> None:
    for array in (
        np.array([1, -2, 3], ml_dtypes.int4),
        np.array([1, 2], ml_dtypes.float8_e4m3fnuz),
        np.array(["a", "ü"], object),
    ):
        proto = graph.to_proto(holding(gs.Constant("c", array)))
        onnx.checker.check_model(proto)
        back = numpy_helper.to_array(proto.graph.initializer[0])
        assert back.tolist() == array.tolist()
        assert graph.values(gs.Constant("c", array)) is array


def test_touching_graphsurgeons_own_values_keeps_the_type() -> None:
    array = np.array([1, -2, 3, 4, 5], ml_dtypes.int4)
    model = holding(graph.constant("c", array))
    assert model.graph.outputs[0].values.tolist() == array.tolist()
    tensor = graph.to_proto(model).graph.initializer[0]
    assert tensor.data_type == TensorProto.INT4
    assert numpy_helper.to_array(tensor).tolist() == array.tolist()


def test_values_may_not_be_written_to() -> None:
    for array in (np.ones(3, np.float32), np.ones(3000, np.float32)):
        made = graph.constant("c", array)
        with pytest.raises(ValueError, match="read-only"):
            graph.values(made)[0] = 2
        array[0] = 5
        assert graph.values(made)[0] == 1


def test_weights_in_constant_nodes_are_read_too() -> None:
    value = numpy_helper.from_array(np.arange(4000, dtype=np.float32), "v")
    node = helper.make_node("Constant", [], ["c"], value=value)
    ends = [helper.make_tensor_value_info("c", TensorProto.FLOAT, [4000])]
    proto = helper.make_model(helper.make_graph([node], "g", [], ends), opset_imports=[helper.make_opsetid("", 21)])
    held = graph.from_proto(proto).graph.nodes[0].attrs["value"]
    assert graph.values(held)[-1] == 3999
