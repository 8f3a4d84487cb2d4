"""Let the tests of this folder import the modules that lie beside them; build the libraries that they need once."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from qpipe import plugins
from qpipe.calibrate.errors import PluginError

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> object:
    if shutil.which("g++") is None:
        pytest.skip("the emulation of the CUDA kernels needs g++")
    import cuda_emulation

    return cuda_emulation.build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="session")
def plugin_library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Build the plugin from the sources as they are, unless the built one is newer than all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(plugins.PATH_VARIABLE, str(_current_library() or _build(tmp_path_factory.mktemp("plugin"))))
        yield plugins.library_path()


def _current_library() -> Path | None:
    folder = Path(plugins.__file__).parent
    sources = [p for p in folder.rglob("*") if p.suffix in {".cc", ".h", ".map", ".txt"}]
    try:
        built = plugins.library_path()
        plugins.info()
    except PluginError:
        return None
    return built if built.stat().st_mtime > max(p.stat().st_mtime for p in sources) else None


def _build(folder: Path) -> Path:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("building the plugin needs cmake and a C++ compiler")
    try:
        plugins.headers_path(fetch=True)
    except PluginError as error:
        pytest.skip(f"ONNX Runtime's C headers cannot be had: {error.found}")
    return plugins.build(cuda="OFF", folder=folder)
