"""gpu_check: every plan of every shape class against a float64 reference on the device."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

SOURCE = Path(__file__).resolve().parents[2] / "plugins" / "bench" / "gpu_check.cu"


@pytest.fixture(scope="module")
def program(capability: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("gpu_check") / "gpu_check"
    number = capability.replace(".", "") + ("a" if capability == "9.0" else "")
    flags = ["-std=c++17", "-O3", "-DQPIPE_NO_CUBLAS", "-gencode", f"arch=compute_{number},code=sm_{number}"]
    subprocess.run(["nvcc", *flags, str(SOURCE), "-o", str(target)], check=True)
    return target


def test_every_plan_is_right(program: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = subprocess.run([program, "--check", "--json", report], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["wrong"] == 0
    assert found["calls"] > 1000
    assert 0 < found["worst"] <= 1
