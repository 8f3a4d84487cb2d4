"""Weights that are found in the bytes of a model file: the same model as protobuf reads, for any file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from qpipe.calibrate.errors import ModelError
from qpipe.pipeline import graph
from qpipe.pipeline.graph import embedded
from qpipe.pipeline.graph.constants import EmbeddedValues, stored
from quantizing import model, normal, run

TEXT = "g (float[N,8] x) => (float[N,4] y, float[N,4] z) { a = MatMul(x, w)  y = MatMul(a, v)  z = Add(y, b) }"


@pytest.fixture(autouse=True)
def _small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "LARGE", 64)


def source() -> onnx.ModelProto:
    return model(TEXT, w=normal(8, 8), b=normal(4), v=normal(8, 4))


def held(path: Path) -> dict[str, bool]:
    """Weights of a loaded model: whether they were found in the file's bytes."""
    return {c.name: isinstance(stored(c), EmbeddedValues) for c in graph.constants(graph.load(path).graph)}


def test_large_weights_are_found_and_mean_the_same(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(source(), path)
    assert held(path) == {"w": True, "v": True, "b": False}
    loaded = graph.load(path)
    back = graph.to_proto(loaded)
    wanted, got = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (source(), back))
    np.testing.assert_equal(got, wanted)
    written, x = graph.save(loaded, tmp_path / "copy.onnx"), {"x": normal(2, 8)}
    np.testing.assert_equal(run(onnx.load(written[0]), x), run(source(), x))
    assert graph.model_hash(loaded) == graph.model_hash(graph.from_proto(source())) == graph.model_hash(written[0])


def test_what_remains_is_small_and_fields_of_any_order_are_kept() -> None:
    proto = source()
    proto.graph.initializer[0].doc_string = "behind the data"
    proto.metadata_props.add(key="k", value="v")
    parted = embedded.split(proto.SerializeToString())
    rest = onnx.ModelProto.FromString(parted.rest)
    assert sorted(parted.weights) == [0, 2]
    assert bytes(parted.weights[0]) == proto.graph.initializer[0].raw_data
    for number in parted.weights:
        assert not rest.graph.initializer[number].HasField("raw_data")
        rest.graph.initializer[number].raw_data = bytes(parted.weights[number])
    assert rest == proto


@pytest.mark.parametrize("change", ["sizes", "type", "twice", "two graphs"])
def test_what_is_unusual_is_left_to_the_parser(tmp_path: Path, change: str) -> None:
    proto, path = source(), tmp_path / "m.onnx"
    tensor = proto.graph.initializer[0]
    if change == "sizes":
        tensor.dims[0] = 7
    if change == "type":
        tensor.data_type = 99
    data = proto.SerializeToString()
    if change == "twice":
        again = onnx.TensorProto(raw_data=bytes(256)).SerializeToString()
        tail = tensor.SerializeToString() + again
        rest = source()
        del rest.graph.initializer[0]
        head = embedded.tag_and_length(7, len(embedded.tag_and_length(5, len(tail)) + tail))
        data = rest.SerializeToString() + head + embedded.tag_and_length(5, len(tail)) + tail
    if change == "two graphs":
        data += embedded.tag_and_length(7, 2) + embedded.tag_and_length(10, 0)
    path.write_bytes(data)
    if change in ("sizes", "type"):
        with pytest.raises(ModelError, match=r"does not fit its sizes|unknown type"):
            graph.load(path)
        return
    wanted, got = onnx.ModelProto.FromString(data), graph.to_proto(graph.load(path))
    raw = {t.name: t.raw_data for t in wanted.graph.initializer}
    assert all(raw[tensor.name] == tensor.raw_data for tensor in got.graph.initializer)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_bytes_are_read_as_protobuf_reads_them(data: st.DataObject) -> None:
    """Damaged files: either all is left to the parser, or weights put back give what the parser reads."""
    whole = bytearray(source().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(1, len(whole)))]) if data.draw(st.booleans()) else bytes(whole)
    parted = embedded.split(cut)
    if not parted.weights:
        assert parted.rest == cut
        return
    try:
        expected = onnx.ModelProto.FromString(cut)
    except Exception:  # noqa: BLE001 - protobuf's own; what it refuses as a whole it refuses in parts
        with pytest.raises(Exception):  # noqa: B017, PT011
            onnx.ModelProto.FromString(parted.rest)
        return
    rest = onnx.ModelProto.FromString(parted.rest)
    for number, weight in parted.weights.items():
        rest.graph.initializer[number].raw_data = bytes(weight)
    assert rest.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)
