"""What is collected of layer inputs beside histograms, and what that takes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser
from qpipe.calibrate.errors import UnsupportedError
from qpipe.pipeline.graph import from_proto
from qpipe.pipeline.stages.details import require_memory, wanted_details

NET = """<ir_version: 8, opset_import: ["": 17]>
g (float[N,3,8,8] x, float[N,6] t) => (float[N,4,6,6] y, float[N,10] u) {
    y = Conv <kernel_shape = [3, 3]> (x, c)
    a = MatMul (t, m)
    b = MatMul (t, n)
    s = Add (a, b)
    u = Gemm <transB = 1> (s, w)
}"""


def model():
    proto = parser.parse_model(NET)
    shapes = {"c": (4, 3, 3, 3), "m": (6, 5), "n": (6, 5), "w": (10, 5)}
    for name, shape in shapes.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))
    return from_proto(proto).graph


def test_gram_matrices_that_do_not_fit_are_refused_before_anything_runs():
    graph = model()
    details = wanted_details(graph, "gram")
    assert set(details) == {"x", "t", "s"}
    needed = 8 * (27**2 + 6**2 + 5**2)  # the two readers of t share one
    require_memory(graph, details, needed)
    with pytest.raises(UnsupportedError, match="XᵀX of 3 layer inputs") as caught:
        require_memory(graph, details, needed - 1)
    assert "--detail channels" in caught.value.do


def test_magnitudes_per_channel_take_next_to_nothing():
    graph = model()
    require_memory(graph, wanted_details(graph, "channels"), 0)
    assert wanted_details(graph, "none") == {}
