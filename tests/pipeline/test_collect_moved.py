"""Tensors that hold the values of another one are not counted again, and have the statistics of counting them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser
from qpipe.calibrate.stats.channel_amax import ChannelAmax
from qpipe.calibrate.stats.histogram import Histogram
from qpipe.pipeline.calibration import native
from qpipe.pipeline.calibration.job import Job
from qpipe.pipeline.calibration.moved import MOVES, moved
from qpipe.pipeline.calibration.observe import Detail
from qpipe.pipeline.calibration.runner import Runner
from qpipe.pipeline.graph import from_proto
from qpipe.pipeline.stages.collect import CollectOptions, collect

NET = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 4, 6] x) => (float[N, 24] y, float[N, 4, 6] z)
<int64[2] shape = {0, -1}, float[2] k = {1.0, 2.0}, int64[1] one = {1}>
{
    t = Transpose <perm = [0, 2, 1]> (x)
    r = Relu (t)
    i = Identity (r)
    u = Unsqueeze (i, one)
    f = Squeeze (u, one)
    b = Transpose <perm = [0, 2, 1]> (f)
    y = Reshape (b, shape)
    z = Reshape (b, s)
    s = Shape (x)
    c = Identity (k)
}"""
NET = NET.replace("    z = Reshape (b, s)\n    s = Shape (x)\n", "    s = Shape (x)\n    z = Reshape (b, s)\n")
TENSORS = ["x", "t", "r", "i", "u", "f", "b", "y", "z", "c"]


@pytest.fixture(autouse=True, params=["native", "numpy"])
def counting(request, monkeypatch) -> None:
    """Count inside the graph, and by numpy."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "usable", lambda device: False)
    elif not native.usable("cpu"):
        pytest.skip("the plugin library is not built")


def values(x: np.ndarray) -> dict[str, np.ndarray]:
    """Return every tensor, as ONNX Runtime computes it."""
    model = parser.parse_model(NET)
    present = {entry.name for entry in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in TENSORS[1:] if n not in present)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return {"x": x, **dict(zip(TENSORS[1:], session.run(TENSORS[1:], {"x": x}), strict=True))}


def test_they_have_the_statistics_of_counting_them():
    x = np.random.default_rng(0).standard_normal((5, 4, 6)).astype(np.float32)
    expected = values(x)
    found = collect(parser.parse_model(NET), TENSORS, [{"x": x[:2]}, {"x": x[2:]}]).tensors
    assert list(found) == ["x", "t", "r", "i", "u", "f", "b", "y", "z", "c"]
    for name in TENSORS[:-1]:
        assert found[name].histogram == Histogram.of(expected[name]), name
    assert found["c"].histogram.total == 4  # computed again in each of two runs


def test_only_what_they_come_from_is_observed():
    runner = Runner(from_proto(parser.parse_model(NET)), Job(tensors=tuple(TENSORS)))
    assert sorted(runner.observers()._observers) == ["c", "r", "x"]


def test_channels_are_taken_of_the_tensor_itself():
    x = np.random.default_rng(0).standard_normal((5, 4, 6)).astype(np.float32)
    options = CollectOptions(details={"t": Detail()})
    found = collect(parser.parse_model(NET), TENSORS, [{"x": x}], options).tensors["t"]
    assert found.histogram == Histogram.of(x)
    assert np.array_equal(found.channels.amax, ChannelAmax.of(values(x)["t"].reshape(-1, 4)).amax)


def test_a_source_that_is_no_measurement_is_not_one():
    graph = parser.parse_model(NET).graph
    assert "c" not in moved(graph, TENSORS)
    assert moved(graph, TENSORS, alone={"y"}) == {"t": "x", "i": "r", "u": "r", "f": "r", "b": "r", "z": "r"}
    assert moved(graph, ["t", "y"]) == {}
    assert "Relu" not in MOVES
