"""ONNX Runtime on a processor with AVX2 only: it saturates there, and what the target's rules make does not."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "bench" / "avx2_only.py"

SUMS = """
import json
import numpy as np, onnx, onnxruntime
from onnx import helper, TensorProto
from qpipe import plugins
x, w = np.full((1, 64), 255, np.uint8), np.full((64, 64), WEIGHT, np.int8)
graph = helper.make_graph(
    [helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "g",
    [helper.make_tensor_value_info("x", TensorProto.UINT8, x.shape)],
    [helper.make_tensor_value_info("y", TensorProto.INT32, [1, 64])],
    [onnx.numpy_helper.from_array(w, "w")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
found = session.run(None, {"x": x})[0]
lanes = plugins.info()["lanes"] if plugins.is_built() else []
print(json.dumps({"exact": bool((found == x.astype(np.int32) @ w.astype(np.int32)).all()), "lanes": lanes}))
"""


def on_avx2(weight: int) -> dict:
    """Return what a process that sees AVX2 only finds of a product with ``weight``."""
    code = SUMS.replace("WEIGHT", str(weight))
    command = [sys.executable, str(PROGRAM), sys.executable, "-c", code]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode == 5:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_eight_bit_weights_saturate() -> None:
    assert on_avx2(127)["exact"] is False


def test_seven_bit_weights_do_not() -> None:
    found = on_avx2(63)
    assert found["exact"] is True
    assert not {"amx", "avx512vnni", "avxvnni"} & set(found["lanes"])
