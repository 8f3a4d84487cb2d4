"""Batches side by side: the result, its order and what goes wrong are those of one after the other."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser
from qpipe.calibrate.errors import DataError
from qpipe.calibrate.stats.histogram import Histogram, HistogramObserver
from qpipe.pipeline.calibration import native, probe
from qpipe.pipeline.calibration.lanes import Room, in_lanes, lanes_for, processors
from qpipe.pipeline.calibration.observe import Detail
from qpipe.pipeline.calibration.probe import Probe
from qpipe.pipeline.stages.collect import Checkpoints, CollectOptions, collect

NET = (
    '<ir_version: 8, opset_import: ["": 17]> g (float[N, 16] x) => (float[N, 16] y) { a = MatMul (x, w) y = Relu (a) }'
)


def model() -> onnx.ModelProto:
    proto = parser.parse_model(NET)
    weight = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return proto


def batches(count: int = 24) -> list[dict[str, np.ndarray]]:
    """Return ragged batches, the first ones the largest: later ones are then done before them."""
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((4000 // (i + 1), 16)).astype(np.float32)} for i in range(count)]


@pytest.fixture(params=["native", "numpy"])
def ways(request) -> dict[str, Any]:
    if request.param == "native" and not native.usable("cpu"):
        pytest.skip("the plugin library is not built")
    return {"native": request.param == "native", "details": {"x": Detail(), "a": Detail()}}


def test_the_file_does_not_depend_on_the_number_of_lanes(tmp_path: Path, ways: dict[str, Any]) -> None:
    for lanes in (1, 2, 4):
        for every in (None, 3):
            checkpoints = Checkpoints(path=tmp_path / f"{lanes}-{every}", batches=every)
            collect(model(), ["x", "a", "y"], batches(), CollectOptions(threads=lanes, checkpoints=checkpoints, **ways))
    written = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(written) == 1


def test_data_may_use_its_array_again(ways: dict[str, Any]) -> None:
    def reusing() -> Iterator[dict[str, np.ndarray]]:
        x = np.empty((64, 16), np.float32)
        for value in range(20):
            x[:] = value
            yield {"x": x}

    found = collect(model(), ["x"], reusing(), CollectOptions(threads=4, **ways)).tensors["x"]
    assert found.histogram == Histogram.of(np.repeat(np.arange(20, dtype=np.float32), 64 * 16))


def test_two_batches_run_at_a_time(monkeypatch: pytest.MonkeyPatch, ways: dict[str, Any]) -> None:
    met = threading.Barrier(2, timeout=30)
    original = Probe.run

    def run(self: Probe, batch: dict[str, np.ndarray]) -> Iterator[Any]:
        met.wait()
        return original(self, batch)

    monkeypatch.setattr(Probe, "run", run)
    collect(model(), ["x"], batches(6), CollectOptions(threads=2, **ways))


def test_batches_that_do_not_fit_together_run_alone(monkeypatch: pytest.MonkeyPatch, ways: dict[str, Any]) -> None:
    inside, most = [], []
    original = Probe._run

    def run(self: Probe, names: list[str], batch: dict[str, np.ndarray]) -> list[Any]:
        inside.append(batch)
        most.append(len(inside))
        time.sleep(0.001)
        inside.pop()
        return original(self, names, batch)

    monkeypatch.setattr(Probe, "_run", run)
    collect(model(), ["x"], batches(8), CollectOptions(threads=4, batch_bytes=10_000, **ways))
    assert set(most) == {1}
    assert len(most) > 8  # in pieces


def test_the_first_bad_batch_is_named(ways: dict[str, Any]) -> None:
    data = batches()
    data[3], data[4], data[5] = {"x": np.zeros((3000, 7), np.float32)}, {"x": np.zeros((1, 5), np.float32)}, {}
    with pytest.raises(DataError) as caught:
        collect(model(), ["x"], data, CollectOptions(threads=4, **ways))
    assert "3000, 7" in str(caught.value)


def returning(value: int, pause: float = 0.0) -> int:
    time.sleep(pause)
    return value


def failing(text: str) -> int:
    raise ValueError(text)


def steps(*values: int) -> Iterator[Callable[[], int]]:
    """Yield steps, earlier ones slower."""
    return (functools.partial(returning, value, 0.002 * (len(values) - value)) for value in values)


def test_results_come_in_order_and_the_last_one_is_all() -> None:
    found = list(in_lanes(steps(*range(9)), 3))
    assert [value for value, _ in found] == list(range(9))
    assert found[-1] == (8, True)


def test_errors_of_steps_and_of_their_source_come_in_order() -> None:
    def source() -> Iterator[Callable[[], int]]:
        yield from steps(0, 1)
        yield functools.partial(failing, "a step")
        raise OSError("the source")

    seen = []
    with pytest.raises(ValueError, match="a step"):
        seen.extend(value for value, _ in in_lanes(source(), 8))
    assert seen == [0, 1]
    seen.clear()

    def broken() -> Iterator[Callable[[], int]]:
        yield from steps(0, 1)
        raise OSError("the source")

    with pytest.raises(OSError, match="the source"):
        seen.extend(value for value, _ in in_lanes(broken(), 8))
    assert seen == [0, 1]


def test_holding_lets_one_step_begin_at_a_time() -> None:
    assert [is_all for _, is_all in in_lanes(steps(*range(5)), 3, lambda ahead: True)] == [True] * 5
    found = [is_all for _, is_all in in_lanes(steps(*range(8)), 3, lambda ahead: ahead >= 2)]
    assert found[0] is False
    taken = []

    def watched() -> Iterator[Callable[[], int]]:
        for step in steps(*range(9)):
            taken.append(step)
            yield step

    for value, _ in in_lanes(watched(), 2):
        assert len(taken) <= value + 1 + 2


@settings(max_examples=20, deadline=None)
@given(limit=st.integers(1, 30), sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_room_is_never_taken_twice(limit: int, sizes: list[int]) -> None:
    room, held, lock = Room(limit), [], threading.Lock()

    def work(size: int) -> int:
        with room.of(size):
            with lock:
                held.append(size)
                assert sum(held) <= limit or held.count(0) + 1 >= len(held)
            time.sleep(0.0005)
            with lock:
                held.remove(size)
        return size

    assert [size for size, _ in in_lanes((functools.partial(work, s) for s in sizes), 4)] == sizes


def test_threads_may_count_into_one_observer() -> None:
    arrays = [np.random.default_rng(i + 20).standard_normal(5000).astype(np.float32) * 10.0**i for i in range(-20, 20)]
    observer = HistogramObserver()
    jobs = (functools.partial(observer.update, array) for array in arrays)
    assert len(list(in_lanes(jobs, 8))) == len(arrays)
    assert observer.result() == Histogram.of(np.concatenate(arrays))


@pytest.mark.parametrize(("count", "threads", "inside"), [(1, 6, 6), (2, 6, 3), (2, 2, 1), (2, 1, 1), (3, None, None)])
def test_lanes_and_operators_share_the_threads(
    monkeypatch: pytest.MonkeyPatch, count: int, threads: int | None, inside: int | None
) -> None:
    opened = []
    original = probe.make_session
    monkeypatch.setattr(probe, "make_session", lambda data, **how: (opened.append(how), original(data, **how))[1])
    collect(model(), ["x"], batches(count), CollectOptions(threads=threads))
    if threads is None:
        lanes = lanes_for(None)
        assert opened[0]["threads"] == (None if lanes == 1 else processors() - lanes + 1)
    else:
        assert opened[0]["threads"] == inside
    spins = opened[0]["extras"].config.get("session.intra_op.allow_spinning") != "0"
    assert spins == (count == 1 or lanes_for(threads) == 1)


def test_sums_over_pairs_of_channels_are_added_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are as large as all that is kept: no second set of them waits for its turn."""
    opened = []
    original = probe.make_session
    monkeypatch.setattr(probe, "make_session", lambda data, **how: (opened.append(how), original(data, **how))[1])
    found = collect(model(), ["x"], batches(3), CollectOptions(threads=4, details={"x": Detail(gram=True)}))
    assert opened[0]["threads"] == 4
    assert found.tensors["x"].gram is not None
    assert found.tensors["x"].gram.tokens == sum(len(batch["x"]) for batch in batches(3))
