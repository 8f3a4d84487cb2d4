"""What this machine and this installation can do: the facts of ``qpipe doctor``.

Facts are found by trying, not by asking: a provider counts as usable when a session really opens on it, an opset when
a model of it really loads. ONNX Runtime lists providers whose libraries are missing, and falls back without a word.
"""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..calibrate.errors import EnvironmentError_
from . import cpu, runtime

SCHEMA_VERSION = 1

RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-training")
"""Distributions that install into the same folder and overwrite each other."""

CUDA_LIBRARIES = ("cudart", "cublas", "cublasLt", "cudnn", "cufft", "curand", "nvrtc")
"""What the CUDA provider of ONNX Runtime loads."""

LITTLE_DISK = 2**30

EXTRAS = ("cpu", "gpu", "gpu-system", "torch", "models")
"""Extras that a user may have asked for; those for developing qpipe are left out."""

_REQUIREMENT = re.compile(r"^(?P<name>[\w.\-]+)(?:\[[^\]]*\])?[^;]*>=(?P<floor>[\d.]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Something about the machine or the installation that a user should know.

    Attributes:
        level: ``"error"`` (a command will fail), ``"warning"`` (results or safety suffer) or ``"note"``.
        what: What was found.
        do: What to do about it; empty when nothing needs doing.
    """

    level: str
    what: str
    do: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What was found.

    Attributes:
        facts: By section: ``system``, ``cpu``, ``packages``, ``runtime``, ``cuda``, ``plugin``, ``storage``.
        advice: What a user should know or do.
    """

    facts: dict[str, Any]
    advice: tuple[Advice, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON data."""
        advice = [{"level": a.level, "what": a.what, "do": a.do} for a in self.advice]
        return {"schema_version": SCHEMA_VERSION, **self.facts, "advice": advice}


def examine(folder: Path | None = None) -> Environment:
    """Collect all facts about this machine and this installation.

    Args:
        folder: Where the user is going to write; None for the current folder.
    """
    facts = {
        "system": system_facts(),
        "cpu": cpu_facts(),
        "packages": package_facts(),
        "runtime": runtime_facts(),
        "cuda": cuda_facts(),
        "plugin": plugin_facts(),
        "storage": storage_facts(folder or Path.cwd()),
    }
    return Environment(facts=facts, advice=tuple(advise(facts)))


def brief() -> dict[str, Any]:
    """Return the few facts that belong into every report: versions, CPU and threads."""
    packages = ("qpipe", "numpy", "onnx", *RUNTIMES)
    versions = {name: version for name in packages if (version := installed(name))}
    return {"python": platform.python_version(), "packages": versions, "cpu": cpu_facts()}


def system_facts() -> dict[str, Any]:
    """Return interpreter, operating system and memory [bytes]."""
    memory = psutil.virtual_memory()
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "memory_bytes": memory.total,
        "memory_free_bytes": memory.available,
    }


def cpu_facts() -> dict[str, Any]:
    """Return model name, usable cores and instruction sets of the CPU."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": cpu.cpu_name(),
        "machine": platform.machine(),
        "usable_cores": usable,
        **cpu.cpu_features(),
        "vnni": cpu.has_vnni(),
        "int8_saturates": cpu.int8_saturates(),
    }


def package_facts() -> dict[str, dict[str, Any]]:
    """Return every package that qpipe names, with its version, the lowest one that will do, and whether it does.

    The floors are those of the installed qpipe's own metadata. A package that is missing has version None; that is
    no fault by itself where it belongs to an extra.
    """
    found = {}
    for name, (floor, optional) in _floors().items():
        version = installed(name)
        ok = optional if version is None else _number(version) >= _number(floor)
        found[name] = {"version": version, "floor": floor, "optional": optional, "ok": ok}
    return found


def runtime_facts() -> dict[str, Any]:
    """Return which ONNX Runtime is installed, where, what its providers can do, and which files it runs."""
    distributions = {name: version for name in RUNTIMES if (version := installed(name))}
    facts: dict[str, Any] = {"distributions": distributions, "version": None}
    try:
        ort = runtime.load_onnxruntime()
    except EnvironmentError_ as error:
        return {**facts, "error": str(error.found or error.what)}
    from . import ceilings, session

    providers = {name: session.provider_error(name) for name in ort.get_available_providers()}
    return {
        **facts,
        "version": ort.__version__,
        "folder": str(Path(str(ort.__file__)).parent),
        "providers": {name: {"usable": error is None, "why_not": error} for name, error in providers.items()},
        **ceilings.measure(),
    }


def cuda_facts() -> dict[str, Any]:
    """Return the NVIDIA driver and where each CUDA library lies, None for those that were not found."""
    driver = Path("/proc/driver/nvidia/version")
    folders = list(_library_folders())
    return {
        "driver": driver.read_text(encoding="utf-8").splitlines()[0].strip() if driver.is_file() else None,
        "libraries": {name: _find_library(name, folders) for name in CUDA_LIBRARIES},
    }


def plugin_facts() -> dict[str, Any]:
    """Return whether qpipe's operator library is built, whether it loads, and what it says about itself."""
    from .. import plugins

    if not plugins.is_built():
        return {"built": False, "loads": False, "error": None}
    try:
        plugins.register(runtime.load_onnxruntime().SessionOptions())
        return {"built": True, "loads": True, "error": None, **plugins.info()}
    except EnvironmentError_ as error:
        return {"built": True, "loads": False, "error": str(error)}


def storage_facts(folder: Path) -> dict[str, Any]:
    """Return free space [bytes] and write permission in ``folder`` and in the folder for temporary files."""
    places = {"folder": folder, "temporary": Path(tempfile.gettempdir())}
    return {
        name: {
            "path": str(path),
            "free_bytes": shutil.disk_usage(path).free,
            "writable": os.access(path, os.W_OK | os.X_OK),
        }
        for name, path in places.items()
    }


def advise(facts: dict[str, Any]) -> Iterator[Advice]:
    """Yield what a user should know, from the facts alone."""
    yield from _advise_packages(facts["packages"])
    yield from _advise_runtime(facts["runtime"], facts["cuda"])
    if facts["cpu"]["int8_saturates"]:
        what = "this CPU has no VNNI: fused int8 kernels clip intermediate sums, so results are worse than need be"
        yield Advice(level="note", what=what, do="quantize with --target ort-cpu, which keeps weights to 7 bits here")
    plugin = facts["plugin"]
    if plugin["built"] and not plugin["loads"]:
        what = f"the operator library does not load: {plugin['error']}"
        yield Advice(level="error", what=what, do="qpipe plugin build")
    for place in facts["storage"].values():
        if not place["writable"]:
            yield Advice(level="error", what=f"{place['path']} is not writable", do="choose another folder with -o")
        elif place["free_bytes"] < LITTLE_DISK:
            what = f"{place['free_bytes'] / 2**20:.0f} MiB are free in {place['path']}"
            yield Advice(level="warning", what=what, do="free some space: a model is written whole, then put in place")


def installed(name: str) -> str | None:
    """Return the version of an installed distribution, None when there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _advise_packages(packages: dict[str, dict[str, Any]]) -> Iterator[Advice]:
    for name, fact in packages.items():
        if not fact["ok"]:
            found = f"is {fact['version']}" if fact["version"] else "is missing"
            level = "warning" if fact["version"] else "error"
            what = f"{name} {found}, qpipe needs {fact['floor']} or newer"
            yield Advice(level=level, what=what, do=f"pip install --upgrade '{name}>={fact['floor']}'")


def _advise_runtime(facts: dict[str, Any], cuda: dict[str, Any]) -> Iterator[Advice]:
    names = list(facts["distributions"])
    if len(names) > 1:
        keep = next((name for name in names if name != "onnxruntime"), names[0])
        what = f"{' and '.join(names)} are installed together and overwrite each other's files"
        yield Advice(level="error", what=what, do=f"pip uninstall -y {' '.join(names)} && pip install {keep}")
    if facts["version"] is None:
        yield Advice(level="error", what=f"no usable ONNX Runtime: {facts['error']}", do=runtime.INSTALL_LINE)
        return
    cuda_provider = facts["providers"].get("CUDAExecutionProvider")
    if cuda["driver"] and not (cuda_provider and cuda_provider["usable"]):
        missing = [name for name, path in cuda["libraries"].items() if path is None]
        reason = f"not found: {', '.join(missing)}" if missing else "the provider does not load"
        what = f"there is an NVIDIA driver, but the CUDA provider is not usable ({reason})"
        yield Advice(level="warning", what=what, do="pip install 'onnxruntime-gpu[cuda,cudnn]'")


def _floors() -> dict[str, tuple[str, bool]]:
    """Return floor and whether it belongs to an extra, per distribution that qpipe's metadata names."""
    try:
        requirements = metadata.requires("qpipe") or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, tuple[str, bool]] = {}
    for line in requirements:
        extra = re.search(r'extra == "([^"]+)"', line)
        if (match := _REQUIREMENT.match(line)) and (extra is None or extra[1] in EXTRAS):
            found.setdefault(match["name"], (match["floor"], extra is not None))
    return found


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))  # type: ignore[index]


def _library_folders() -> Iterator[Path]:
    for entry in sys.path:
        yield from Path(entry).glob("nvidia/*/lib") if entry else ()
    for entry in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep):
        if entry:
            yield Path(entry)
    for place in ("/usr/local/cuda/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64"):
        yield Path(place)


def _find_library(name: str, folders: list[Path]) -> str | None:
    found = (path for folder in folders for path in sorted(folder.glob(f"lib{name}.so*")))
    return next((str(path) for path in found), None)
