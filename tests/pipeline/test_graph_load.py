"""Any bytes end in a model or in an error that names what they are."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import random
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, parser
from qpipe.calibrate.errors import ModelError, QpipeError, UsageError
from qpipe.pipeline import graph
from qpipe.pipeline.graph.lazy import Reader

MODEL = parser.parse_model("""
    <ir_version: 10, opset_import: ["": 21]>
    g (float[N,3] x, bool c) => (float[N,3] y) <float[3] w = {1, 2, 3}, int64[1] axes = {1}> {
        h = Mul(x, w)
        m = ReduceMean <keepdims = 1> (h, axes)
        z = Sub(h, m)
        y = If (c) <then_branch = t () => (float[N,3] a) { a = Add(z, w) }, else_branch = e () => (float[N,3] b) {
            b = Neg(z) }>
    }""")


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"...")
    return buffer.getvalue()


WHOLE = MODEL.SerializeToString()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 90912\n"

KINDS = {
    "empty": (b"", "an empty file"),
    "truncated": (WHOLE[: len(WHOLE) // 2], "cut off"),
    "random": (bytes([255, 0, 254]) * 50, "no ONNX model, or is cut off"),
    "html": (b"\n<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
    "xml": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "an HTML page"),
    "zip": (zipped(), "a zip archive"),
    "lfs": (LFS, "a git-lfs pointer"),
    "text": (b"import torch\nprint('h\xc3\xa9llo')\n", "a text file"),
    "gzip": (gzip.compress(WHOLE), "a gzip archive"),
    "pickle": (pickle.dumps({"a": 1}), "a Python pickle"),
    "gguf": (b"GGUF\x03\0\0\0", "a GGUF file"),
    "safetensors": (b'\x10\0\0\0\0\0\0\0{"a": {}}       ', "a safetensors file"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_model_is_named(tmp_path: Path, kind: str) -> None:
    data, name = KINDS[kind]
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=name) as info:
        graph.load(path)
    assert info.value.exit_code == 3
    assert info.value.where == str(path)
    assert info.value.do


def test_a_git_lfs_pointer_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(LFS)
    with pytest.raises(ModelError) as info:
        graph.load(tmp_path / "model.onnx")
    assert info.value.do == "git lfs pull"


@pytest.mark.parametrize("step", range(1, 12))
def test_a_cut_off_model_is_refused_wherever_it_was_cut(tmp_path: Path, step: int) -> None:
    (tmp_path / "model.onnx").write_bytes(WHOLE[: len(WHOLE) * step // 12])
    with pytest.raises(ModelError):
        graph.load(tmp_path / "model.onnx")


def test_a_missing_file_suggests_a_near_one(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.onnx").write_bytes(WHOLE)
    with pytest.raises(UsageError, match="no such file") as info:
        graph.load(tmp_path / "modle.onnx")
    assert info.value.exit_code == 2
    assert info.value.do == f"did you mean {tmp_path / 'models' / 'model.onnx'}?"
    with pytest.raises(UsageError, match="no such file"):
        graph.load(tmp_path / "nowhere" / "model.onnx")
    with pytest.raises(UsageError, match="no such file"):
        graph.load(tmp_path / "models" / "model.onnx" / "model.onnx")


def test_a_folder_suggests_the_model_in_it(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(WHOLE)
    with pytest.raises(UsageError, match="this is a folder") as info:
        graph.load(tmp_path)
    assert info.value.do == f"did you mean {tmp_path / 'model.onnx'}?"


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="a device, pipe or socket"):
        graph.load(tmp_path / "model.onnx")


def test_a_file_without_permission_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(WHOLE)

    def deny(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", deny)
    with pytest.raises(UsageError, match="no permission") as info:
        graph.load(path)
    assert info.value.do == f"chmod u+r {path}"


def test_a_file_too_large_for_protobuf_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(ModelError, match="too large to be one protobuf message"):
        graph.load(path)


def invalid(*nodes: onnx.NodeProto, weights: tuple[TensorProto, ...] = (), **parts: object) -> ModelProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]
    body = helper.make_graph(list(nodes), "g", [x], [y], list(weights))
    return helper.make_model(body, opset_imports=opsets, ir_version=parts.pop("ir_version", 10), **parts)


def weighted(**fields: object) -> ModelProto:
    weight = TensorProto(**{"name": "w", "data_type": TensorProto.FLOAT, "dims": [2], **fields})
    return invalid(helper.make_node("Add", ["x", "w"], ["y"]), weights=(weight,))


RECURSIVE = helper.make_function(
    "f", "r", ["a"], ["b"], [helper.make_node("r", ["a"], ["b"], domain="f")], [helper.make_opsetid("f", 1)]
)
INNER = helper.make_graph(
    [helper.make_node("Relu", ["nothing"], ["o"], name="inside")],
    "b",
    [],
    [helper.make_tensor_value_info("o", TensorProto.FLOAT, [2])],
)

INVALID = {
    "cycle": (
        invalid(
            helper.make_node("Add", ["x", "b"], ["a"], name="first"), helper.make_node("Relu", ["a"], ["y"], name="s")
        ),
        r"topologically sorted.*'b'",
        "node 'first' (Add)",
    ),
    "unsorted": (
        invalid(helper.make_node("Relu", ["a"], ["y"], name="early"), helper.make_node("Relu", ["x"], ["a"])),
        r"topologically sorted.*'a'",
        "node 'early' (Relu)",
    ),
    "attribute": (
        invalid(helper.make_node("Concat", ["x", "x"], ["y"], name="cat")),
        "Required attribute 'axis' is missing",
        "node 'cat' (Concat)",
    ),
    "operator": (invalid(helper.make_node("Foo", ["x"], ["y"], name="foo")), "No Op registered for Foo", "'foo'"),
    "function": (
        invalid(helper.make_node("r", ["x"], ["y"], domain="f"), functions=[RECURSIVE]),
        "must not be recursive",
        "",
    ),
    "branch": (
        invalid(helper.make_node("If", ["x"], ["y"], name="if", then_branch=INNER, else_branch=INNER)),
        "'nothing'",
        "node 'inside' (Relu)",
    ),
    "output": (invalid(helper.make_node("Relu", ["x"], ["z"])), "Graph output 'y' is not an output", ""),
    "assigned twice": (
        invalid(helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Relu", ["x"], ["y"])),
        "single static assignment",
        "",
    ),
    "negative size": (weighted(dims=[-2], raw_data=b""), "'w' has a negative size", ""),
    "huge sizes": (weighted(dims=[2**33, 2**33], raw_data=b"1234"), "'w' does not fit its sizes", ""),
    "short": (weighted(raw_data=b"1234"), "'w' does not fit its sizes", ""),
    "long": (weighted(raw_data=b"123456789012"), "'w' does not fit its sizes", ""),
    "short list": (weighted(float_data=[1.0]), "float_data size", ""),
    "type": (weighted(data_type=99, raw_data=b"12345678"), "'w' has an unknown type", ""),
    "no type": (weighted(data_type=0, raw_data=b"12345678"), "'w' has an unknown type", ""),
    "raw text": (weighted(data_type=TensorProto.STRING, raw_data=b"12345678"), "'w' does not fit its sizes", ""),
    "format": (invalid(helper.make_node("Relu", ["x"], ["y"]), ir_version=99), "ir_version 99 is higher", ""),
}


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_model_is_refused_with_reason_and_node(tmp_path: Path, case: str) -> None:
    proto, reason, node = INVALID[case]
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=reason) as info:
        graph.load(path)
    assert info.value.exit_code == 3
    assert str(path) in str(info.value.where)
    assert node in str(info.value.where)


def test_a_wrong_graph_is_an_error_of_the_stage_that_made_it() -> None:
    model = graph.from_proto(MODEL)
    graph.check(model, after="loading")
    model.graph.nodes.reverse()
    with pytest.raises(ModelError, match=r"after insert\).*topologically sorted"):
        graph.check(model, after="insert")


def test_two_tensors_or_nodes_of_one_name_are_found() -> None:
    model = graph.from_proto(MODEL)
    model.graph.nodes[1].inputs[1] = graph.constant("w", np.array([1]))
    with pytest.raises(ModelError, match=r"two tensors are called 'w' \(after solve\)"):
        graph.check(model, after="solve")
    model = graph.from_proto(MODEL)
    model.graph.nodes[1].name = model.graph.nodes[0].name
    with pytest.raises(ModelError, match=r"two nodes are called 'Mul_0' \(after solve\)"):
        graph.check(model, after="solve")


def test_checking_does_not_read_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = graph.from_proto(MODEL)

    def opener() -> Reader:
        raise AssertionError("the weight was read")

    model.graph.nodes[0].inputs[1] = graph.constant("big", graph.Lazy((3,), np.float32, opener))
    graph.check(model, after="insert")
    with pytest.raises(AssertionError):
        graph.to_proto(model)


def outcome(path: Path) -> str:
    try:
        graph.check(graph.load(path), after="loading")
    except QpipeError as error:
        return f"code {error.exit_code}"
    return "model"


@pytest.mark.parametrize("seed", range(3))
def test_damaged_bytes_end_in_a_model_or_a_clear_error(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    path = tmp_path / "model.onnx"
    outcomes: Counter[str] = Counter()
    for _ in range(200):
        data = bytearray(WHOLE)
        position = generator.randrange(len(data))
        if generator.random() < 0.7:
            data[position] ^= 1 << generator.randrange(8)
        else:
            data[position : position + generator.randint(0, 3)] = generator.randbytes(generator.randint(0, 3))
        path.write_bytes(data)
        outcomes[outcome(path)] += 1
    assert set(outcomes) == {"model", "code 3"}
    assert min(outcomes.values()) > 5
