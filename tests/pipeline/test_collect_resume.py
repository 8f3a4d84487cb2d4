"""A run that is stopped or killed goes on where it was, and ends with the very bytes of an undisturbed run."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser
from qpipe.calibrate.errors import DataError
from qpipe.pipeline.calibration import load, merge, save
from qpipe.pipeline.calibration.observe import Detail
from qpipe.pipeline.interrupts import Interrupted
from qpipe.pipeline.stages.collect import Checkpoints, CollectOptions, collect

SAMPLES = 40


def model() -> onnx.ModelProto:
    """Return a model with weights that make sums inexact."""
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 8] x) => (float[N, 8] y){ a = MatMul (x, w) y = Relu (a) }'
    )
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return proto


def batches(size: int = 2, seed: int = 1, samples: int = SAMPLES) -> Iterator[dict[str, np.ndarray]]:
    """Yield the data, with an empty batch now and then."""
    x = np.random.default_rng(seed).standard_normal((samples, 8)).astype(np.float32)
    for start in range(0, samples, size):
        if start % (4 * size) == 0:
            yield {"x": x[:0]}
        yield {"x": x[start : start + size]}


def options(path: Path, **changes) -> CollectOptions:
    settings = {"resume": True, "batches": 1, **changes}
    return CollectOptions(
        details={"x": Detail(gram=True), "a": Detail()}, checkpoints=Checkpoints(path=path, **settings)
    )


@pytest.fixture(scope="module", params=["native", "numpy"])
def undisturbed(tmp_path_factory, request) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "a.qcal"
    native = request.param == "native"
    collect(model(), ["x", "a", "y"], batches(), dataclasses.replace(options(path, batches=None), native=native))
    return path.read_bytes()


def stopping(after: int, signum: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the data, and send this process a signal while a batch is being prepared."""
    for index, batch in enumerate(batches()):
        if index == after:
            os.kill(os.getpid(), signum)
        yield batch


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_batch_and_saves(tmp_path, undisturbed, signum, code):
    path = tmp_path / "a.qcal"
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as caught:
        collect(model(), ["x", "a", "y"], stopping(9, signum), options(path, batches=None))
    assert caught.value.exit_code == code
    assert isinstance(caught.value, KeyboardInterrupt)
    assert signal.getsignal(signum) is before
    assert 0 < load(path).samples < SAMPLES
    collect(model(), ["x", "a", "y"], batches(), options(path))
    assert path.read_bytes() == undisturbed


def test_a_second_signal_stops_at_once(tmp_path):
    def impatient() -> Iterator[dict[str, np.ndarray]]:
        yield next(iter(batches(samples=2)))
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(Interrupted, match="at once"):
        collect(model(), ["x"], impatient(), options(tmp_path / "a.qcal", batches=None))
    assert not (tmp_path / "a.qcal").exists()


@pytest.mark.parametrize("stop", [0, 1, 7, 19])
def test_data_that_fails_leaves_the_last_checkpoint(tmp_path, undisturbed, stop):
    def failing() -> Iterator[dict[str, np.ndarray]]:
        for index, batch in enumerate(batches()):
            if index == stop:
                raise OSError("the disk with the images is gone")
            yield batch

    path = tmp_path / "a.qcal"
    with pytest.raises(OSError, match="images"):
        collect(model(), ["x", "a", "y"], failing(), options(path))
    assert path.exists() == (stop > 1)
    collect(model(), ["x", "a", "y"], batches(), options(path))
    assert path.read_bytes() == undisturbed


def test_going_on_with_another_batch_size_counts_every_sample_once(tmp_path, undisturbed):
    path = tmp_path / "a.qcal"
    with pytest.raises(Interrupted):
        collect(model(), ["x", "a", "y"], stopping(9, signal.SIGINT), options(path))
    again = collect(model(), ["x", "a", "y"], batches(size=3), options(path))
    (tmp_path / "whole.qcal").write_bytes(undisturbed)
    whole = load(tmp_path / "whole.qcal")
    assert again.samples == SAMPLES
    assert again.data == whole.data
    assert again.tensors["x"].histogram == whole.tensors["x"].histogram


def test_going_on_after_the_end_changes_nothing(tmp_path, undisturbed):
    path = tmp_path / "a.qcal"
    path.write_bytes(undisturbed)
    collect(model(), ["x", "a", "y"], batches(), options(path))
    assert path.read_bytes() == undisturbed
    more = collect(model(), ["x", "a", "y"], [*batches(), *batches(seed=5)], options(path))
    assert more.samples == 2 * SAMPLES


@pytest.mark.parametrize("other", [batches(seed=2), batches(samples=2), iter([])])
def test_other_data_is_refused(tmp_path, undisturbed, other):
    path = tmp_path / "a.qcal"
    path.write_bytes(undisturbed)
    with pytest.raises(DataError, match="not the data of the run to resume") as caught:
        collect(model(), ["x", "a", "y"], other, options(path))
    assert caught.value.exit_code == 4
    assert path.read_bytes() == undisturbed


def test_other_tensors_options_or_models_are_refused(tmp_path, undisturbed):
    path = tmp_path / "a.qcal"
    path.write_bytes(undisturbed)
    with pytest.raises(DataError, match="other tensors or options"):
        collect(model(), ["x", "a"], batches(), options(path))
    sentinel = CollectOptions(sentinel=1e20, checkpoints=Checkpoints(path=path, resume=True))
    with pytest.raises(DataError, match="other tensors or options"):
        collect(model(), ["x", "a", "y"], batches(), sentinel)
    other = model()
    other.graph.node[1].op_type = "Sigmoid"
    with pytest.raises(DataError, match="another model"):
        collect(other, ["x", "a", "y"], batches(), options(path))


def test_merged_files_cannot_be_resumed(tmp_path, undisturbed):
    path = tmp_path / "a.qcal"
    path.write_bytes(undisturbed)
    save(merge(load(path), load(path)), path, force=True)
    with pytest.raises(DataError, match="not the data"):
        collect(model(), ["x", "a", "y"], batches(), options(path))


def test_time_alone_makes_a_checkpoint(tmp_path):
    path = tmp_path / "a.qcal"
    seen = []

    def watched() -> Iterator[dict[str, np.ndarray]]:
        for batch in batches():
            seen.append(path.exists())
            yield batch

    collect(model(), ["x"], watched(), CollectOptions(checkpoints=Checkpoints(path=path, seconds=0.0)))
    assert not any(seen[:2])
    assert any(seen[3:])


KILLER = """
import importlib.util, os, random, signal, sys, time
spec = importlib.util.spec_from_file_location("resume", sys.argv[1])
resume = importlib.util.module_from_spec(spec)
spec.loader.exec_module(resume)
from pathlib import Path
path, count = Path(sys.argv[2]), int(sys.argv[3])

def run(delay):
    def slow():
        for batch in resume.batches():
            time.sleep(delay)
            yield batch
    resume.collect(resume.model(), ["x", "a", "y"], slow(), resume.options(path))

random.seed(7)
for turn in range(count):
    path.unlink(missing_ok=True)
    finished = False
    for attempt in range(4):  # killed up to three times, then left alone
        child = os.fork()
        if child == 0:
            run(0.002)
            os._exit(0)
        if attempt < 3:
            time.sleep(random.uniform(0.0, 0.25))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        finished = status == 0
    assert finished
    assert path.read_bytes() == Path(sys.argv[4]).read_bytes(), f"turn {turn}"
    left = [p.name for p in path.parent.iterdir() if p.name not in (path.name, Path(sys.argv[4]).name)]
    assert not left, left
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
@pytest.mark.parametrize("count", [3, pytest.param(17, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path, count):
    collect(model(), ["x", "a", "y"], batches(), options(tmp_path / "whole"))
    arguments = [__file__, tmp_path / "a.qcal", count, tmp_path / "whole"]
    command = [sys.executable, "-c", textwrap.dedent(KILLER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
