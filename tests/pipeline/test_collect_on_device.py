"""Counters that stay on the device: what the collecting stage does with them, tried on the CPU.

The operator has no CPU kernel. Its stand-in here is a function of standard operators that counts zeros only, and is
therefore right for tensors that hold nothing else; the kernel itself is tried in ``tests/plugins`` and ``tests/gpu``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from qpipe import plugins
from qpipe.calibrate.stats.histogram import BINS, Histogram
from qpipe.pipeline.calibration import native
from qpipe.pipeline.calibration.observe import Detail
from qpipe.pipeline.stages.collect import CollectOptions, collect
from qpipe.plugins.range_stats.device import STATE_WORDS, DeviceCounters

pytest.importorskip("onnxruntime")

MODEL = """<ir_version: 10, opset_import: ["": 21]> g (float[N,3] x) => (float[N,3] y) {
    a = Neg (x)
    low = Relu (a)
    y = Add (low, x)
}"""
STAND_IN = """<domain: "qpipe", opset_import: ["": 21]> RangeStats (x, state) => (new_state) {
    size = Size (x)
    seen = Mul (size, unit)
    sum = Add (state, seen)
    new_state = Where (is_key, key, sum)
}"""
ZERO_KEY = 0x80000000


def constant(name: str, value: np.ndarray) -> onnx.NodeProto:
    return onnx.helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))


def stand_in() -> onnx.FunctionProto:
    function = parser.parse_function(STAND_IN)
    words = np.arange(STATE_WORDS)
    is_key = (words == BINS + 1) | (words == BINS + 2)
    for name, value in (
        ("unit", (words == 0).astype(np.int64)),
        ("is_key", is_key),
        ("key", np.full(STATE_WORDS, ZERO_KEY, np.int64)),
    ):
        function.node.insert(0, constant(name, value))
    return function


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Histogram]]:
    """Count on the "device"; return the list of what is copied from it."""

    def counters_of(proto: onnx.ModelProto, job: Any, sentinels: dict[str, float]) -> native.CountersOnDevice:
        proto.functions.append(stand_in())
        return native.CountersOnDevice(proto, sentinels, device="cpu")

    taken: list[dict[str, Histogram]] = []
    original = DeviceCounters.take

    def take(self: DeviceCounters) -> dict[str, Histogram]:
        taken.append(original(self))
        return taken[-1]

    monkeypatch.setattr("qpipe.pipeline.calibration.probe.counters_of", counters_of)
    monkeypatch.setattr(plugins, "is_built", lambda: False)  # a registered operator would win over the function
    monkeypatch.setattr(DeviceCounters, "take", take)
    return taken


def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": np.abs(rng.normal(size=(n, 3))).astype(np.float32)} for n in (4, 1, 7)]


def test_counters_are_copied_once_and_the_rest_is_counted_here(
    takes: list[dict[str, Histogram]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpipe.pipeline.calibration.probe.countable", lambda proto, job, known: ["low"])
    found = collect(parser.parse_model(MODEL), ["x", "low", "y"], batches(), CollectOptions())
    plain = np.concatenate([batch["x"] for batch in batches()])
    assert found.tensors["low"].histogram == Histogram.of(np.zeros_like(plain))
    for name in ("x", "y"):
        assert found.tensors[name].histogram == Histogram.of(plain)
    assert [sorted(copy) for copy in takes] == [["low"]]


def test_what_needs_more_than_a_histogram_comes_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "usable", lambda device: True)
    proto = parser.parse_model(MODEL)
    known = {name: native.Known(onnx.TensorProto.FLOAT, 0) for name in ("x", "low", "y")}
    details = {"low": Detail()}
    for device, expected in (("cpu", ["x", "low", "y"]), ("cuda", ["x", "y"])):
        job = native.Job(tensors=("x", "low", "y"), details=details, device=device)
        assert native.countable(proto, job, known) == expected


@pytest.mark.parametrize(("cuda", "expected"), [("13.0", True), (None, False)])
def test_a_library_without_cuda_does_not_count_there(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, expected: bool
) -> None:
    monkeypatch.setattr(plugins, "is_built", lambda: True)
    monkeypatch.setattr(plugins, "info", lambda: {"cuda": cuda})
    assert native.usable("cpu")
    assert native.usable("cuda") == expected
    assert not native.usable("auto")
