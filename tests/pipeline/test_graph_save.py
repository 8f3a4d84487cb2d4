"""Saving: the target is the old model or the complete new one, whatever happens while it is written."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from qpipe.calibrate.errors import WriteError
from qpipe.pipeline import graph
from qpipe.pipeline.graph import lazy, writing
from qpipe.pipeline.graph.constants import FileValues
from qpipe.pipeline.graph.lazy import Reader, Region

EXTERNAL = {"external_threshold": 0}
TARGET = "model.onnx"


def model_of(value: float, count: int = 3, rows: int = 64) -> graph.Model:
    """Return a model with ``count`` weights [rows, rows] that hold ``value``, ``value + 1``, ... and a note of it."""
    nodes, weights = [], []
    for i in range(count):
        weights.append(numpy_helper.from_array(np.full((rows, rows), value + i, np.float32), f"w{i}"))
        nodes.append(helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"], name=f"n{i}"))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", rows]) for name in ("h0", f"h{count}")]
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    model = graph.from_proto(helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    model.metadata["value"] = str(int(value))
    return model


def state(folder: Path) -> str:
    """Return the value that the model at the target holds, "none", or what is wrong with it."""
    if not (folder / TARGET).exists():
        return "none"
    model = graph.load(folder / TARGET)
    found = [graph.values(node.inputs[1]) for node in model.graph.nodes]
    first = found[0].flat[0]
    whole = all((array == first + i).all() for i, array in enumerate(found))
    is_one = whole and len(found) == 3 and model.metadata["value"] == str(int(first))
    return str(int(first)) if is_one else "broken: data and model file do not belong together"


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def in_child(action: Callable[[], object], kill_after: float | None = None) -> int:
    """Run ``action`` in a forked child and perhaps kill it; return its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            action()
            status = 0
        except WriteError as error:
            status = error.exit_code
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("options", [{}, EXTERNAL], ids=["embedded", "external"])
def test_a_saved_model_loads_everywhere(tmp_path: Path, options: dict[str, int]) -> None:
    written = graph.save(model_of(1), tmp_path / TARGET, **options)
    expected = [TARGET, f"{TARGET}.data"] if options else [TARGET]
    assert sorted(path.name for path in written) == names(tmp_path) == expected
    assert written[-1].name == TARGET
    onnx.checker.check_model(tmp_path / TARGET, full_check=True)
    proto = onnx.load(tmp_path / TARGET)
    assert [numpy_helper.to_array(tensor)[0, 0] for tensor in proto.graph.initializer] == [1, 2, 3]
    assert state(tmp_path) == "1"


def test_external_weights_run_as_embedded_ones_do(tmp_path: Path) -> None:
    session = pytest.importorskip("onnxruntime").InferenceSession
    model = model_of(0.25)
    graph.save(model, tmp_path / "embedded.onnx")
    graph.save(model, tmp_path / "external.onnx", **EXTERNAL)
    x = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    outputs = [
        session(tmp_path / name, providers=["CPUExecutionProvider"]).run(None, {"h0": x})[0]
        for name in ("embedded.onnx", "external.onnx")
    ]
    np.testing.assert_array_equal(*outputs)


def test_external_weights_begin_at_pages_and_small_ones_stay_inside(tmp_path: Path) -> None:
    model = model_of(1)
    model.graph.nodes[0].inputs[1] = graph.constant("small", np.ones((64, 1), np.float32))
    graph.save(model, tmp_path / TARGET, **EXTERNAL)
    tensors = onnx.load(tmp_path / TARGET, load_external_data=False).graph.initializer
    places = {t.name: {entry.key: entry.value for entry in t.external_data} for t in tensors}
    size = 64 * 64 * 4
    assert places["small"] == {}
    assert places["w1"] == {"location": f"{TARGET}.data", "offset": "0", "length": str(size)}
    assert places["w2"] == {"location": f"{TARGET}.data", "offset": str(size), "length": str(size)}
    assert (tmp_path / f"{TARGET}.data").stat().st_size == 2 * size


def test_a_model_of_small_tensors_gets_no_data_file(tmp_path: Path) -> None:
    graph.save(model_of(1, rows=2), tmp_path / TARGET, **EXTERNAL)
    assert names(tmp_path) == [TARGET]


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for _ in range(3):
        graph.save(model_of(1), tmp_path / TARGET, force=True, **EXTERNAL)
        contents.append([(tmp_path / name).read_bytes() for name in names(tmp_path)])
    assert names(tmp_path) == [TARGET, f"{TARGET}.data"]
    assert contents[0] == contents[1] == contents[2]


def test_untouched_external_weights_are_copied_without_being_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph.save(model_of(1), tmp_path / TARGET, **EXTERNAL)
    model = graph.load(tmp_path / TARGET)

    def refuse(self: FileValues) -> np.ndarray:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr(FileValues, "read", refuse)
    monkeypatch.setattr("qpipe.pipeline.graph.external.CHUNK", 1000)
    graph.save(model, tmp_path / "copy.onnx", **EXTERNAL)
    assert (tmp_path / "copy.onnx.data").read_bytes() == (tmp_path / f"{TARGET}.data").read_bytes()


def sizes(region: Region) -> list[int]:
    return [part.stop - part.start for part in region]


def test_computed_weights_are_streamed_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(0)
    made: list[int] = []

    def ones(region: Region) -> np.ndarray:
        made.append(region[0].start)
        return np.ones(sizes(region), np.int8)

    monkeypatch.setattr(lazy.regions, "__defaults__", (512, 8))
    model.graph.nodes[0].inputs[1] = graph.constant("packed", graph.Lazy((64, 64), np.int8, lambda: ones), "INT4")
    graph.save(model, tmp_path / TARGET, **EXTERNAL)
    assert sorted(made) == list(range(0, 64, 8))
    again = graph.load(tmp_path / TARGET).graph.nodes[0].inputs[1]
    assert graph.stored_size(again) == 64 * 64 // 2
    assert (graph.values(again) == 1).all()
    monkeypatch.undo()
    short = graph.Lazy((64, 64), np.int8, lambda: lambda region: np.zeros((63, 64), np.int8))
    model.graph.nodes[0].inputs[1] = graph.constant("short", short)
    with pytest.raises(ValueError, match="gave 4032 bytes, its type and shape ask 4096"):
        graph.save(model, tmp_path / "short.onnx", **EXTERNAL)
    assert names(tmp_path) == [TARGET, f"{TARGET}.data"]


def test_an_existing_target_needs_force(tmp_path: Path) -> None:
    for options in ({}, EXTERNAL):
        graph.save(model_of(1), tmp_path / TARGET, force=True, **options)
        with pytest.raises(WriteError, match="exists already"):
            graph.save(model_of(2), tmp_path / TARGET, **options)
        assert state(tmp_path) == "1"
        graph.save(model_of(2), tmp_path / TARGET, force=True, **options)
        assert state(tmp_path) == "2"


def test_a_foreign_data_file_is_not_replaced_without_force(tmp_path: Path) -> None:
    (tmp_path / f"{TARGET}.data").write_text("somebody's")
    with pytest.raises(WriteError, match="exists already"):
        graph.save(model_of(1), tmp_path / TARGET, **EXTERNAL)
    assert names(tmp_path) == [f"{TARGET}.data"]
    graph.save(model_of(1), tmp_path / TARGET)
    assert (tmp_path / f"{TARGET}.data").read_text() == "somebody's"


def test_going_from_external_to_embedded_leaves_no_old_data(tmp_path: Path) -> None:
    graph.save(model_of(1), tmp_path / TARGET, **EXTERNAL)
    graph.save(model_of(2), tmp_path / TARGET, force=True)
    assert names(tmp_path) == [TARGET]
    assert state(tmp_path) == "2"


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    graph.save(model_of(1), tmp_path / TARGET, **EXTERNAL)
    (tmp_path / "link.onnx").symlink_to(TARGET)
    (tmp_path / "hard.onnx").hardlink_to(tmp_path / TARGET)
    (tmp_path / "shard").symlink_to(f"{TARGET}.data")
    model = graph.load(tmp_path / TARGET)
    for name in (TARGET, "link.onnx", "hard.onnx", "../" + tmp_path.name + "/" + TARGET, f"{TARGET}.data", "shard"):
        for options in ({}, EXTERNAL):
            with pytest.raises(WriteError, match="the target is the input itself") as info:
                graph.save(model, tmp_path / name, force=True, **options)
            assert info.value.exit_code == 6
    assert state(tmp_path) == "1"


def test_a_data_file_of_the_input_is_never_overwritten(tmp_path: Path) -> None:
    graph.save(model_of(1), tmp_path / TARGET, **EXTERNAL)
    model = graph.load(tmp_path / TARGET)
    (tmp_path / TARGET).rename(tmp_path / "moved.onnx")
    with pytest.raises(WriteError, match="the target is the input itself"):
        graph.save(model, tmp_path / TARGET, force=True, **EXTERNAL)


def test_a_link_is_replaced_itself_and_only_with_force(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / TARGET).symlink_to("precious")
    with pytest.raises(WriteError, match="exists already"):
        graph.save(model_of(1), tmp_path / TARGET)
    graph.save(model_of(1), tmp_path / TARGET, force=True)
    assert (tmp_path / "precious").read_text() == "precious"
    assert state(tmp_path) == "1"


@pytest.mark.parametrize("force", [False, True], ids=["new", "replace"])
@pytest.mark.parametrize("options", [{}, EXTERNAL], ids=["embedded", "external"])
def test_a_file_size_limit_leaves_no_partial_file(tmp_path: Path, options: dict[str, int], force: bool) -> None:
    if force:
        graph.save(model_of(1), tmp_path / TARGET, **options)
    before = names(tmp_path)
    model, whole = model_of(5), 3 * 64 * 64 * 4
    limits = [0, 1, 100, 1000, *range(whole // 16, whole, whole // 16), whole - 1]
    assert len(limits) == 20

    for limit in limits:

        def save(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            graph.save(model, tmp_path / TARGET, force=force, **options)

        assert in_child(save) == WriteError.exit_code, limit
        assert names(tmp_path) == before, limit
        assert state(tmp_path) == ("1" if force else "none"), limit
    graph.save(model, tmp_path / TARGET, force=force, **options)
    assert state(tmp_path) == "5"


def test_a_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "require_space", lambda target, size: (_ for _ in ()).throw(WriteError(str(size))))
    with pytest.raises(WriteError) as info:
        graph.save(model_of(1), tmp_path / TARGET, **EXTERNAL)
    assert int(str(info.value)) >= 3 * 64 * 64 * 4
    assert names(tmp_path) == []


def kill_at(step: int) -> None:
    """Arrange that this process kills itself at the ``step``-th file operation from here on."""
    left = [step]
    events = {"open", "os.rename", "os.remove", "os.link", "os.truncate", "os.scandir", "os.listdir"}

    def count(event: str, _: tuple[object, ...]) -> None:
        if event in events:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def assert_recovers(folder: Path, old: str, options: dict[str, int]) -> str:
    """Check what a killed run left: the old or the new model, and nothing that the next run does not clear away."""
    found = state(folder)
    assert found in (old, "5")
    graph.save(model_of(7), folder / TARGET, force=found != "none", **options)
    assert state(folder) == "7"
    assert names(folder) == ([TARGET, f"{TARGET}.data"] if options else [TARGET])
    return found


@pytest.mark.parametrize("old", ["none", "1"])
@pytest.mark.parametrize("options", [{}, EXTERNAL], ids=["embedded", "external"])
def test_killed_at_every_file_operation(tmp_path: Path, options: dict[str, int], old: str) -> None:
    seen = []
    for step in range(1000):
        folder = tmp_path / str(step)
        folder.mkdir()
        if old != "none":
            graph.save(model_of(int(old)), folder / TARGET, **options)
        model = model_of(5)

        def save(step: int = step, folder: Path = folder, model: graph.Model = model) -> None:
            kill_at(step)
            graph.save(model, folder / TARGET, force=old != "none", **options)

        if in_child(save) == 0:
            break
        seen.append(assert_recovers(folder, old, options))
    assert set(seen) == {old, "5"}, "both outcomes must have been met"
    assert len(seen) > 10


def kill_at_random(tmp_path: Path, points: int) -> None:
    model = model_of(5, rows=512)
    start = time.perf_counter()
    graph.save(model, tmp_path / "timed.onnx", **EXTERNAL)
    longest = 1.5 * (time.perf_counter() - start) + 0.005
    generator = random.Random(points)
    for point in range(points):
        folder = tmp_path / str(point)
        folder.mkdir()
        graph.save(model_of(1), folder / TARGET, **EXTERNAL)
        in_child(
            lambda folder=folder: graph.save(model, folder / TARGET, force=True, **EXTERNAL),
            kill_after=generator.uniform(0, longest),
        )
        assert_recovers(folder, "1", EXTERNAL)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 8)


@pytest.mark.slow
def test_killed_at_fifty_random_moments(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 50)


def test_a_second_save_is_told_who_writes(tmp_path: Path) -> None:
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        model = model_of(5)

        def opener() -> Reader:
            os.write(tell, b"x")
            time.sleep(60)
            raise AssertionError

        model.graph.nodes[0].inputs[1] = graph.constant("slow", graph.Lazy((64, 64), np.float32, opener))
        try:
            graph.save(model, tmp_path / TARGET, **EXTERNAL)
        finally:
            os._exit(1)
    os.read(ready, 1)
    try:
        with pytest.raises(WriteError, match=f"being written by pid {pid} since") as info:
            graph.save(model_of(6), tmp_path / TARGET, force=True)
        assert info.value.exit_code == 6
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    graph.save(model_of(6), tmp_path / TARGET, **EXTERNAL)
    assert state(tmp_path) == "6"
    assert names(tmp_path) == [TARGET, f"{TARGET}.data"]


def test_a_file_system_without_hard_links_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    for value in (1, 2):
        graph.save(model_of(value), tmp_path / TARGET, force=True, **EXTERNAL)
        assert state(tmp_path) == str(value)
    assert names(tmp_path) == [TARGET, f"{TARGET}.data"]


def test_a_large_model_is_never_one_message(tmp_path: Path) -> None:
    """3 GiB of computed zeros: far beyond protobuf's limit, written and read back with little memory."""
    rows = 2**15
    model = model_of(0, count=3)
    for i, node in enumerate(model.graph.nodes):
        zeros = graph.Lazy((rows, rows), np.int8, lambda: lambda region: np.zeros(sizes(region), np.int8))
        node.inputs[1] = graph.constant(f"big{i}", zeros)
    assert graph.stored_size(model.graph.nodes[0].inputs[1]) == 2**30
    with pytest.raises(Exception, match="does not fit into one protobuf message"):
        graph.to_proto(model)
    graph.check(model, after="insert")
