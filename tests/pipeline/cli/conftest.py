"""A small model with data, and the command line called in process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from qpipe.pipeline.cli import main

NET = """<ir_version: 8, opset_import: ["": 17]> small (float[N,3,8,8] image) => (float[N,4] scores) {
    a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(image, w1, b1)
    b = Relu(a)
    c = GlobalAveragePool(b)
    d = Flatten(c)
    scores = Gemm(d, w2, b2) }"""


@dataclass(frozen=True)
class Done:
    """What a command gave."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Call the command line in this process."""

    def call(*arguments: object) -> Done:
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return call


def small_model(text: str = NET) -> onnx.ModelProto:
    """A Conv net whose nodes have names."""
    rng = np.random.default_rng(0)
    model = parser.parse_model(text)
    shapes = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (6, 4), "b2": (4,)}
    for name, shape in shapes.items():
        array = rng.normal(scale=0.4, size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for node in model.graph.node:
        node.name = f"{node.op_type}_{node.output[0]}"
    return model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with m.onnx, data.npz and load.py, which is also the current one."""
    monkeypatch.chdir(tmp_path)
    onnx.save(small_model(), tmp_path / "m.onnx")
    images = np.random.default_rng(1).normal(size=(24, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", image=images)
    (tmp_path / "load.py").write_text(
        "import numpy as np\n"
        "def load_data():\n"
        "    for image in np.load('data.npz')['image'].reshape(6, 4, 3, 8, 8):\n"
        "        yield {'image': image}\n"
    )
    return tmp_path


@pytest.fixture
def calibrated(folder: Path, run: Run) -> Path:
    """The same folder with m.qcal."""
    done = run("calibrate", "m.onnx", "--data", "data.npz", "-o", "m.qcal")
    assert done.code == 0, done.err
    return folder
