"""Custom operators: contract, numpy reference, function body and native kernels.

Nothing needs the native library in order to import, or to run a model that carries function bodies; with the library
registered ONNX Runtime uses its kernels instead.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibrate.errors import PluginError

if TYPE_CHECKING:
    import onnxruntime

NAME = "libqpipe_ops.so"
BUILD_LINE = "qpipe plugin build"
OLDEST_ONNXRUNTIME = (1, 18)
PATH_VARIABLE = "QPIPE_PLUGIN"
ENTRY_POINTS = (
    "RegisterCustomOps",
    "qpipe_info",
    "qpipe_range_stats_channels",
    "qpipe_range_stats_clear",
    "qpipe_range_stats_histogram",
    "qpipe_range_stats_release",
    "qpipe_range_stats_take_channels",
)
"""Everything that the library exports. One that lacks some was built from other sources than these."""

_SOURCE = Path(__file__).resolve().parent
_ELF_HEADER = struct.Struct("<40xQ10xHH2x")  # e_shoff, e_shentsize, e_shnum of a 64-bit file
_TAIL = 15  # lines of a failed command that a message shows


def library_path() -> Path:
    """Return the plugin library: ``$QPIPE_PLUGIN``, this package's folder, the checkout's ``build``, the user's cache.

    Raises:
        PluginError: There is none, or ``$QPIPE_PLUGIN`` names a file that does not exist.
    """
    if named := os.environ.get(PATH_VARIABLE):
        if not Path(named).is_file():
            raise PluginError(
                f"${PATH_VARIABLE} names no file", where=named, do=f"unset {PATH_VARIABLE}, or {BUILD_LINE}"
            )
        return Path(named)
    for path in _candidates():
        if path.is_file():
            return path
    raise PluginError(
        "the plugin library is not built",
        expected=", ".join(str(path) for path in _candidates()),
        do=BUILD_LINE,
    )


def is_built() -> bool:
    """Whether a plugin library is there (not whether it loads: `info` and `register` say that)."""
    try:
        library_path()
    except PluginError:
        return False
    return True


def register(session_options: onnxruntime.SessionOptions) -> Path:
    """Register the library with a session and return its path.

    Raises:
        PluginError: It is missing, does not load (other machine, damaged), or ONNX Runtime is too old for it.
    """
    path = library_path()
    _load(path)
    _check_onnxruntime(path)
    import onnxruntime.capi.onnxruntime_pybind11_state as state

    try:
        session_options.register_custom_ops_library(str(path))
    except (state.Fail, state.InvalidArgument, state.RuntimeException, RuntimeError) as error:
        raise PluginError(
            "ONNX Runtime refuses the plugin library", where=str(path), found=str(error), do=BUILD_LINE
        ) from error
    return path


def info() -> dict[str, Any]:
    """Return facts about the built library.

    Keys: ``path``, ``version``, ``api_version`` (ONNX Runtime's, the least it needs), ``compiler``, ``cuda`` (toolkit
    version or None), ``lanes`` (instruction sets usable on this CPU, best first).

    Raises:
        PluginError: As `register`.
    """
    path = library_path()
    text = library().qpipe_info()
    return {"path": str(path), **json.loads(text.decode())}


def library() -> ctypes.CDLL:
    """Return the loaded library, for functions that are not operators.

    Raises:
        PluginError: It is missing or does not load.
    """
    return _load(library_path())


def build(*, cuda: str = "AUTO", jobs: int | None = None, folder: Path | None = None) -> Path:
    """Build the library with CMake and return where it was put.

    Args:
        cuda: ``"AUTO"`` (when nvcc is found), ``"ON"`` or ``"OFF"``.
        jobs: Parallel compilations; None takes one per processor.
        folder: Where the library goes; None takes the package's folder when it is writable, else the user's cache.

    Raises:
        PluginError: A tool or ONNX Runtime's headers are missing, or compilation fails.
    """
    for tool in ("cmake", "c++"):
        if shutil.which(os.environ.get("CXX", tool) if tool == "c++" else tool) is None:
            raise PluginError(
                f"{tool} is needed to build the plugin", do="apt-get install cmake g++ (or your system's equivalent)"
            )
    include = headers_path()
    target = _writable_folder() if folder is None else folder
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qpipe-plugin-") as work:
        parallel = str(jobs or os.cpu_count() or 1)
        environment = {**os.environ, "ORT_INCLUDE_DIR": str(include)}
        _run(
            ["cmake", "-S", str(_SOURCE), "-B", work, f"-DQPIPE_CUDA={cuda}", "-DCMAKE_BUILD_TYPE=Release"], environment
        )
        _run(["cmake", "--build", work, "-j", parallel], environment)
        staged = target / f".{NAME}.{os.getpid()}"
        shutil.copy2(Path(work) / NAME, staged)
        staged.replace(target / NAME)
    _load.cache_clear()
    return target / NAME


def headers_path(*, fetch: bool = False) -> Path:
    """Return the folder that holds ``onnxruntime_c_api.h``.

    Args:
        fetch: Download the headers' Debian package into the user's cache when no folder has them.

    Raises:
        PluginError: They are nowhere; the message says how to get them.
    """
    command = ["bash", str(_SOURCE / "fetch_headers.sh"), *([] if fetch else ["--locate"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Path(done.stdout.strip())
    raise PluginError(
        "ONNX Runtime's C headers are needed to build the plugin (its Python wheels do not carry them)",
        found=done.stderr.strip() or None,
        expected="onnxruntime_c_api.h in $ORT_INCLUDE_DIR, /usr/include/onnxruntime or the user's cache",
        do="make plugin-headers",
    )


def _candidates() -> list[Path]:
    return [_SOURCE / NAME, _SOURCE.parent / "build" / "plugins" / NAME, _cache_folder() / NAME]


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qpipe" / f"plugin-{platform.machine()}"


def _writable_folder() -> Path:
    return _SOURCE if os.access(_SOURCE, os.W_OK) else _cache_folder()


@cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        _check_whole(path)
        loaded = ctypes.CDLL(str(path))
        for name in ENTRY_POINTS:
            getattr(loaded, name)
        loaded.qpipe_info.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise PluginError(
            "the plugin library does not load",
            where=str(path),
            found=str(error),
            expected=f"a library built for {platform.machine()} {sys.platform} from the sources of this qpipe",
            do=BUILD_LINE,
        ) from error
    return loaded


def _check_whole(path: Path) -> None:
    """Raise OSError for a file that was cut short: the system's loader would end the process with SIGBUS."""
    with path.open("rb") as file:
        header = file.read(_ELF_HEADER.size)
    if len(header) < _ELF_HEADER.size or not header.startswith(b"\x7fELF\x02\x01"):
        raise OSError("no 64-bit ELF library")
    sections, entry_size, entries = _ELF_HEADER.unpack(header)
    if path.stat().st_size < sections + entry_size * entries:
        raise OSError("the file is cut short")


def _check_onnxruntime(path: Path) -> None:
    import onnxruntime

    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version < OLDEST_ONNXRUNTIME:
        raise PluginError(
            "this ONNX Runtime is too old for the plugin library",
            where=str(path),
            found=f"onnxruntime {onnxruntime.__version__}",
            expected="1.18 or newer",
            do="pip install --upgrade onnxruntime",
        )


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == 0:
        return
    tail = (done.stdout + done.stderr).strip().splitlines()[-_TAIL:]
    raise PluginError("the plugin does not build", where=" ".join(command), found="\n".join(tail), do="qpipe doctor")
