"""A wheel built where the library is built carries it, says so in its tag, and works from what it unpacks to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import qpipe
from qpipe import plugins

ROOT = Path(qpipe.__file__).parent
PROGRAM = """
import json
import numpy as np, onnxruntime as ort, qpipe
from onnx import helper, numpy_helper
from qpipe import plugins
from qpipe.plugins.outlier_matmul import op
rng = np.random.default_rng(0)
x = rng.standard_normal((5, 96)).astype(np.float32)
packed = op.pack(rng.standard_normal((20, 96)), [3], np.float32)
constants = [numpy_helper.from_array(value, name) for name, value in packed.inputs().items()]
node = helper.make_node("OutlierMatMul", ["x", *packed.inputs()], ["y"], domain="qpipe")
ends = [helper.make_tensor_value_info(name, 1, ["M", size]) for name, size in (("x", 96), ("y", 20))]
imports = [helper.make_opsetid("", 17), helper.make_opsetid("qpipe", 1)]
graph = helper.make_graph([node], "g", ends[:1], ends[1:], constants)
model = helper.make_model(graph, opset_imports=imports, ir_version=10)
options = ort.SessionOptions()
plugins.register(options)
y = ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]
print(json.dumps({
    "package": qpipe.__file__,
    "library": str(plugins.library_path()),
    "difference": float(np.abs(y - op.reference(x, packed)[0]).max()),
}))
"""


def checkout_with(library: Path, folder: Path) -> Path:
    """Copy what git tracks, and put the library where `qpipe plugin build` puts it."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listing.returncode != 0:
        pytest.skip("needs a git checkout")
    for name in filter(None, listing.stdout.decode().split("\0")):
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    shutil.copy2(library, folder / "plugins" / plugins.NAME)
    return folder


@pytest.mark.slow
def test_the_wheel_carries_a_library_that_runs(plugin_library: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="the wheel is built with this environment's setuptools")
    source = checkout_with(plugin_library, tmp_path / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-build-isolation"]
    platform = f"--config-settings=--build-option=--plat-name={sysconfig.get_platform()}"
    build = [*pip, "--no-deps", "--no-index", platform, "--wheel-dir", str(tmp_path), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert "any" not in wheel.stem.split("-")[-1]
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    environment = {k: v for k, v in os.environ.items() if k not in (plugins.PATH_VARIABLE, "XDG_CACHE_HOME")}
    environment |= {"PYTHONPATH": str(unpacked), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert Path(found["package"]).is_relative_to(unpacked)
    assert Path(found["library"]).is_relative_to(unpacked)
    assert found["difference"] < 1e-4
