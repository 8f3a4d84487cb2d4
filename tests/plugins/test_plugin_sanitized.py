"""The library built with AddressSanitizer and UBSan runs this folder's kernel tests without a finding."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from qpipe import plugins
from qpipe.calibrate.errors import PluginError

HERE = Path(__file__).parent
RUNTIMES = ("libasan.so", "libubsan.so")


def sanitizer_runtimes() -> list[str]:
    found = []
    for name in RUNTIMES:
        line = subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        found.append(line.strip())
    return [path for path in found if Path(path).is_absolute()]


@pytest.mark.slow
def test_no_finding(tmp_path) -> None:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler")
    runtimes = sanitizer_runtimes()
    if len(runtimes) < len(RUNTIMES):
        pytest.skip("the compiler has no sanitizer runtimes")
    try:
        include = plugins.headers_path(fetch=True)
    except PluginError as error:
        pytest.skip(f"ONNX Runtime's C headers cannot be had: {error.found}")
    source = Path(plugins.__file__).parent
    environment = {**os.environ, "ORT_INCLUDE_DIR": str(include)}
    configure = ["cmake", "-S", str(source), "-B", str(tmp_path), "-DQPIPE_CUDA=OFF", "-DQPIPE_SANITIZE=ON"]
    subprocess.run(configure, check=True, env=environment, capture_output=True)
    subprocess.run(["cmake", "--build", str(tmp_path), "-j"], check=True, env=environment, capture_output=True)
    # Python and ONNX Runtime leak on purpose at exit; leaks of the kernels would drown in that.
    environment |= {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        plugins.PATH_VARIABLE: str(tmp_path / plugins.NAME),
    }
    tests = [str(HERE / name) for name in ("test_outlier_matmul_kernel.py", "test_range_stats.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "runtime error" not in done.stderr
