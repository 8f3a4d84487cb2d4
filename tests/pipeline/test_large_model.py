"""Models that must not be held in memory: peak memory, interrupted runs, and what is never read."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from qpipe.calibrate.errors import WriteError
from qpipe.calibrate.weights import WEIGHT_METHODS
from qpipe.pipeline import graph
from qpipe.pipeline.cli import main
from qpipe.pipeline.cli.options import Bytes
from qpipe.pipeline.graph import writing
from qpipe.pipeline.layouts import layout_of
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.stages.weights import quantize_layer

W4 = ("--scheme", "w4", "--algorithm", "rtn")
Run = Callable[[Path, str], int]


def write_model(path: Path, shapes: list[tuple[int, int]], *, shards: int = 1, seed: int | None = 0) -> Path:
    """Write a chain of products whose weights lie in data files; a ``seed`` of None leaves the files full of holes."""
    rng = np.random.default_rng(seed)
    tensors, nodes = [], []
    for i, shape in enumerate(shapes):
        data = path.with_name(f"{path.stem}.data-{i * shards // len(shapes)}")
        tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        length = 4 * shape[0] * shape[1]
        with data.open("ab") as file:
            offset = file.tell()
            if seed is not None:
                file.write((rng.standard_normal(shape, np.float32) * np.float32(0.05)).tobytes())
            else:
                file.truncate(offset + length)
        for key, value in (("location", data.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
        nodes.append(helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"], f"n{i}"))
    ends = [
        helper.make_tensor_value_info("h0", TensorProto.FLOAT, ["N", shapes[0][0]]),
        helper.make_tensor_value_info(f"h{len(shapes)}", TensorProto.FLOAT, ["N", shapes[-1][1]]),
    ]
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def in_cache(folder: Path, model: Path) -> Path:
    """Move a model into the layout of the Hugging Face cache and return its path there."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "abcd"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for index, path in enumerate(sorted(model.parent.glob(f"{model.stem}.*"))):
        blob = path.rename(blobs / f"{index:040x}")
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot / model.name


def laid_out(folder: Path, shapes: list[tuple[int, int]], layout: str) -> Path:
    """Write a model with ``one`` data file, three ``shards``, three in Hugging Face's ``cache``, or all ``inside``."""
    home = folder / "home"
    home.mkdir()
    model = write_model(home / "m.onnx", shapes, shards=1 if layout == "one" else 3)
    if layout == "inside":
        return graph.save(graph.load(model), folder / "inside.onnx", external_threshold=2**40)[-1]
    return in_cache(folder, model) if layout == "cache" else model


_CHILD = """
import json, sys
from qpipe.pipeline.cli import main
from qpipe.pipeline.graph import writing
from qpipe.pipeline.memory import peak_memory
small, large, threshold, *arguments = sys.argv[1:]
writing.EXTERNAL_THRESHOLD = int(threshold)
codes = [main(["quantize", small, "-o", small + ".q", "-q", *arguments])]
before = peak_memory()
codes.append(main(["quantize", large, "-o", large + ".q", "-q", *arguments]))
print(json.dumps({"codes": codes, "growth": peak_memory() - before}), file=sys.stderr)
"""


def growth(small: Path, large: Path, threshold: int, *arguments: str) -> int:
    """Return how much more memory a child needs for the large model than for the small one."""
    command = [sys.executable, "-c", _CHILD, str(small), str(large), str(threshold), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    told = json.loads(done.stderr.strip().splitlines()[-1])
    assert told["codes"] == [0, 0], done.stderr
    return int(told["growth"])


@pytest.mark.parametrize("threshold", [0, 2**40], ids=["external", "embedded"])
@pytest.mark.parametrize("layout", ["one", "shards", "cache", "inside"])
@pytest.mark.parametrize("scheme", [("--scheme", "w8"), W4], ids=["w8", "w4"])
def test_memory_does_not_grow_with_the_model(
    tmp_path: Path, scheme: tuple[str, ...], layout: str, threshold: int
) -> None:
    """200 MiB of weights with 64 MiB more memory than 1 MiB takes, however they lie and the result is written."""
    small = write_model(tmp_path / "small.onnx", [(512, 512)])
    large = laid_out(tmp_path, [(1024, 1024)] * 50, layout)
    assert growth(small, large, threshold, *scheme) < 64 * 2**20


def test_memory_of_gptq_layer_by_layer_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """64 MiB of weights in layers of 1 MiB."""
    pytest.importorskip("onnxruntime")
    small = write_model(tmp_path / "small.onnx", [(512, 512)] * 2)
    large = laid_out(tmp_path, [(512, 512)] * 64, "one")
    np.savez(tmp_path / "data.npz", h0=np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32))
    arguments = ("--scheme", "w4", "--algorithm", "gptq", "--data", str(tmp_path / "data.npz"))
    assert growth(small, large, 2**40, *arguments) < 40 * 2**20


_LOOK = """
import sys
from qpipe.pipeline.cli import main
from qpipe.pipeline.memory import peak_memory
command, small, large = sys.argv[1:]
codes = [main([command, small])]
before = peak_memory()
codes.append(main([command, large]))
print(*codes, peak_memory() - before)
"""


@pytest.mark.parametrize("command", ["check", "inspect"])
def test_weights_inside_a_model_file_are_not_read_where_they_are_not_needed(tmp_path: Path, command: str) -> None:
    small = write_model(tmp_path / "small.onnx", [(512, 512)])
    large = laid_out(tmp_path, [(1024, 1024)] * 30, "inside")
    assert large.stat().st_size > 110 * 2**20
    done = subprocess.run([sys.executable, "-c", _LOOK, command, small, large], capture_output=True, text=True)
    *codes, grown = map(int, done.stdout.splitlines()[-1].split())
    assert codes == [0, 0], done.stderr
    assert grown < 32 * 2**20


def in_child(action: Callable[[], int], kill_after: float | None = None) -> int:
    """Run ``action`` in a forked child and perhaps kill it; return its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = action()
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def external(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write every result with external data."""
    monkeypatch.setattr(writing, "EXTERNAL_THRESHOLD", 0)


def state(folder: Path) -> str:
    """Say whether the model at the target is none, the ``old`` or the ``new`` one, or neither as a whole."""
    target = folder / "q.onnx"
    if not target.exists():
        return "none"
    digest = graph.model_hash(target)
    return {(folder.parent / f"{name}.hash").read_text(): name for name in ("old", "new")}.get(digest, "broken")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def run(tmp_path: Path, external: None) -> Run:
    """Two models, ``old`` and ``new``, and a function that quantizes one of them into a folder."""

    def quantize(folder: Path, name: str) -> int:
        model = tmp_path / f"{name}.onnx"
        return main(["quantize", str(model), "-o", str(folder / "q.onnx"), "--force", "-q", *W4])

    for seed, name in enumerate(("old", "new")):
        write_model(tmp_path / f"{name}.onnx", [(256, 256)] * 6, seed=seed)
        whole = tmp_path / f"whole-{name}"
        whole.mkdir()
        assert quantize(whole, name) == 0
        (tmp_path / f"{name}.hash").write_text(graph.model_hash(whole / "q.onnx"))
    return quantize


def kill_at_random(folder: Path, run: Run, points: int) -> None:
    start = time.perf_counter()
    assert in_child(lambda: run(folder / "whole-new", "new")) == 0
    longest = 1.3 * (time.perf_counter() - start)
    generator = random.Random(points)
    for point in range(points):
        place = folder / str(point)
        place.mkdir()
        assert run(place, "old") == 0
        in_child(lambda place=place: run(place, "new"), kill_after=generator.uniform(0, longest))
        assert state(place) in ("old", "new")
        assert run(place, "new") == 0
        assert state(place) == "new"
        assert names(place) == ["q.onnx", "q.onnx.data"], "the next run clears away what was left"


def test_quantize_killed_at_random_moments(tmp_path: Path, run: Run) -> None:
    kill_at_random(tmp_path, run, 6)


@pytest.mark.slow
def test_quantize_killed_at_fifty_random_moments(tmp_path: Path, run: Run) -> None:
    kill_at_random(tmp_path, run, 50)


def test_a_file_size_limit_leaves_the_old_model_whole(tmp_path: Path, run: Run) -> None:
    place = tmp_path / "place"
    place.mkdir()
    assert run(place, "old") == 0
    whole = (tmp_path / "whole-new" / "q.onnx.data").stat().st_size
    limits = [0, 1, 100, 1000, *range(whole // 16, whole, whole // 16), whole - 1]
    assert len(limits) >= 20
    for limit in limits:

        def limited(limit: int = limit) -> int:
            # What pytest captures goes to files too, which the limit must not concern.
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return run(place, "new")

        assert in_child(limited) == WriteError.exit_code, limit
        assert state(place) == "old", limit
        assert names(place) == ["q.onnx", "q.onnx.data"], limit
    assert run(place, "new") == 0
    assert state(place) == "new"


def test_scratch_space_that_is_full_is_a_write_error(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qpipe.pipeline.graph.scratch.LARGE", 1024)
    place = tmp_path / "place"
    place.mkdir()
    assert run(place, "old") == 0

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        return run(place, "new")

    assert in_child(limited) == WriteError.exit_code
    assert "TMPDIR" in capfd.readouterr().err
    assert state(place) == "old"


@pytest.mark.parametrize("layout", ["one", "shards", "cache"])
@pytest.mark.parametrize("scheme", [("--scheme", "w8"), W4], ids=["w8", "w4"])
def test_every_layout_gives_the_model_that_memory_gives(
    tmp_path: Path, external: None, layout: str, scheme: tuple[str, ...]
) -> None:
    ort = pytest.importorskip("onnxruntime")
    source = laid_out(tmp_path, [(128, 256), (256, 96), (96, 64)], layout)
    output = tmp_path / "q.onnx"
    assert main(["quantize", str(source), "-o", str(output), "-q", "--target", "portable", *scheme]) == 0
    ort.InferenceSession(output, providers=["CPUExecutionProvider"])
    recipe = make_recipe(scheme=scheme[1], weights={"algorithm": "rtn"})
    assert recipe.weights is not None
    after = {node.name: node for node in graph.load(output).graph.nodes}
    for node in graph.load(source).graph.nodes:
        weight = np.asarray(graph.values(node.inputs[1]))
        spec = recipe.weights.spec(1, 0)
        whole = quantize_layer(weight, spec, layout_of(node, weight.shape), WEIGHT_METHODS.get("rtn"))
        dequantize = after[node.name].inputs[1].inputs[0]
        assert graph.values(dequantize.inputs[0]).tobytes() == whole.q.tobytes()
        held = graph.values(dequantize.inputs[1])
        assert np.array_equal(held, whole.params.scale.reshape(held.shape))


@pytest.mark.parametrize("command", [("check",), ("inspect",), ("inspect", "--tensors")], ids=" ".join)
def test_weights_that_need_not_be_read_are_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    """1 TiB of holes: more than any machine that runs this has."""
    path = write_model(tmp_path / "m.onnx", [(2**19, 2**19)], seed=None)
    assert main([command[0], str(path), *command[1:], "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["schema_version"] == 1


BOMB = """<ir_version: 10, opset_import: ["": 21]> g (float[N,4] x) => (float[N,4] y) {
    big = ConstantOfShape (shape)
    total = ReduceSum (big)
    y = Add (total, x)
}"""


def bomb(folder: Path) -> Path:
    """A model whose shape, known before it runs, asks for 256 GiB; and data for it."""
    model = onnx.parser.parse_model(BOMB)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2**18, 2**18], np.int64), "shape"))
    onnx.save(model, folder / "bomb.onnx")
    np.savez(folder / "data.npz", x=np.ones((2, 4), np.float32))
    return folder / "bomb.onnx"


@pytest.mark.parametrize("command", ["calibrate", "quantize"])
def test_a_model_that_asks_for_too_much_is_refused_before_it_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    pytest.importorskip("onnxruntime")
    arguments = ["--data", str(tmp_path / "data.npz"), "-o", str(tmp_path / "out"), "--max-memory", "64GiB", "-q"]
    assert main([command, str(bomb(tmp_path)), *arguments]) == 3
    told = capfd.readouterr().err
    assert "256 GiB" in told
    assert "ConstantOfShape" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["much", "-1", "0", "8 giraffes", "1e9"])
def test_a_size_that_is_none_is_usage(tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str) -> None:
    assert main(["calibrate", str(bomb(tmp_path)), "-o", str(tmp_path / "out"), "--max-memory", text]) == 2
    assert "8GiB" in capfd.readouterr().err


def test_sizes_are_read_as_they_are_written() -> None:
    written = {"1048576": 2**20, "1KiB": 1024, "1.5 GiB": 3 * 2**29, "2GB": 2 * 10**9, "500mb": 5 * 10**8}
    assert {text: Bytes().convert(text, None, None) for text in written} == written


def test_a_tensor_that_would_be_far_too_large_when_computed_is_left_alone(tmp_path: Path) -> None:
    """A ConstantOfShape of 256 GiB is neither folded nor made."""
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[N,64] x) => (float[N,64] y, float[A,B] big)
        <int64[2] shape = {262144, 262144}> { y = MatMul(x, w)  big = ConstantOfShape(shape) }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w"))
    onnx.save(model, tmp_path / "bomb.onnx")

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
        return main(["quantize", str(tmp_path / "bomb.onnx"), "-o", str(tmp_path / "q.onnx"), "--scheme", "w8", "-q"])

    assert in_child(limited) == 0
    assert "ConstantOfShape" in {node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node}


_RUN = """
import sys
from pathlib import Path
import numpy as np
from qpipe.pipeline.memory import peak_memory
from qpipe.pipeline.session import SessionExtras, make_session
session = make_session(Path(sys.argv[1]), exact=True, extras=SessionExtras(mapped=sys.argv[2] == "mapped"))
before = peak_memory()
session.run(None, {"h0": np.ones((2, 1024), np.float32)})
print(peak_memory() - before)
"""


def test_weights_are_dequantized_one_after_the_other_when_they_are_mapped(tmp_path: Path) -> None:
    """40 weights of 4 MiB in float: held together where nothing is asked for, a few at a time where that is asked."""
    pytest.importorskip("onnxruntime")
    source = write_model(tmp_path / "m.onnx", [(1024, 1024)] * 40)
    arguments = ["-o", str(tmp_path / "q.onnx"), "-q", "--target", "portable", "--scheme", "w8"]
    assert main(["quantize", str(source), *arguments]) == 0
    grown = {}
    for kind in ("plain", "mapped"):
        command = [sys.executable, "-c", _RUN, str(tmp_path / "q.onnx"), kind]
        grown[kind] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown["mapped"] < 64 * 2**20 < grown["plain"]
