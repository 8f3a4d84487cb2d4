"""What the GPU tests need: an NVIDIA GPU, nvcc, and the plugin built with CUDA. Each is asked for, never assumed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from qpipe import plugins

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "plugins")]


def compute_capability() -> str | None:
    """Return e.g. ``"9.0"``, None without a working GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return asked.stdout.split()[0] if asked.returncode == 0 and asked.stdout.strip() else None


@pytest.fixture(scope="session")
def capability() -> str:
    found = compute_capability()
    if found is None:
        pytest.skip("no NVIDIA GPU: nvidia-smi is missing or finds none")
    if shutil.which("nvcc") is None:
        pytest.skip("CUDA's compiler, nvcc, is not on the PATH")
    return found


@pytest.fixture(scope="session")
def cuda_plugin(capability: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the plugin with CUDA and let the package find it."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider")
    path = plugins.build(cuda="ON", folder=tmp_path_factory.mktemp("plugin"))
    os.environ[plugins.PATH_VARIABLE] = str(path)
    return path
