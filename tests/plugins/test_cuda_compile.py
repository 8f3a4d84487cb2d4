"""The CUDA sources compile for sm_80 and sm_90a, without spills and without serialized wgmma; nothing is run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import cuda_compile as cc
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="CUDA's compiler, nvcc, is not on the PATH"),
]


@pytest.fixture(scope="module")
def headers() -> Path:
    found = cc.ort_headers()
    if found is None:
        pytest.skip("ONNX Runtime's C headers are not there")
    return found


@pytest.mark.parametrize("architecture", cc.ARCHITECTURES)
@pytest.mark.parametrize("source", cc.KERNEL_SOURCES, ids=lambda path: path.parent.name)
def test_kernels_compile_without_spills(source: Path, architecture: str, headers: Path, tmp_path: Path) -> None:
    figures, text = cc.compile_source(source, architecture, tmp_path, headers)
    assert figures
    assert [row for row in figures if row.spill_stores or row.spill_loads or row.stack] == []
    # C7508: setmaxnreg ignored; C7510, C7519, C7520: wgmma serialized or held up by inserted waits.
    assert "(C75" not in text
    assert "warning" not in text.lower()
    running = {row.kernel.split("<")[0] for row in figures if not row.is_empty}
    if source.parent.name == "outlier_matmul":
        expected = {"quantize_rows_kernel", "small_m_kernel", "gemm_mma_kernel"}
        assert running == expected | ({"gemm_wgmma_kernel"} if architecture == "90a" else set())


def test_gpu_check_compiles(tmp_path: Path) -> None:
    source = cc.PLUGINS / "bench" / "gpu_check.cu"
    # PTX only: the machine code is that of the kernels above.
    target = ["-gencode", "arch=compute_80,code=compute_80", "-DQPIPE_NO_CUBLAS"]
    subprocess.run(
        ["nice", "-n", "10", "nvcc", "-std=c++17", *target, "-c", str(source), "-o", str(tmp_path / "gpu_check.o")],
        check=True,
    )
