"""Let the tests of this folder import the modules that lie beside them; build the emulated CUDA kernels once."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> object:
    if shutil.which("g++") is None:
        pytest.skip("the emulation of the CUDA kernels needs g++")
    import cuda_emulation

    return cuda_emulation.build(tmp_path_factory.mktemp("cuda"))
