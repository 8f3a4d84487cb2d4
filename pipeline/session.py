"""Make an ONNX Runtime session the one right way.

Two kinds of session exist. *Exact* runs every operator as ONNX defines it: graph optimizations off, so that no
Q/DQ pair is fused into an integer kernel. *Deployed* is what a user of ONNX Runtime gets by default: fused integer
kernels, which saturate 16-bit sums on x86 CPUs without VNNI, and weight-only products whose activations are rounded
to int8 (accuracy level 4). Both are measured by `validate`, apart.
"""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..calibrate.errors import EnvironmentError_, ModelError, QpipeError, UnsupportedError, UsageError

if TYPE_CHECKING:
    import onnx
    import onnxruntime

INSTALL_LINE = "pip install 'qpipe[cpu]' (any machine) or pip install 'qpipe[gpu]' (NVIDIA GPU)"
CUDA_LINE = "pip install 'onnxruntime-gpu[cuda,cudnn]', or leave out --device cuda; see qpipe doctor"

ACCURACY_KEY = "session.qdq_matmulnbits_accuracy_level"
EXACT_ACCURACY_LEVEL = "1"
"""Activations of fused weight-only products stay float32."""
DEPLOYED_ACCURACY_LEVEL = "4"
"""ONNX Runtime's own default: activations of fused weight-only products are rounded to int8."""

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_QUIET = 4
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionExtras:
    """What few sessions need beside the usual.

    Attributes:
        config: Session configuration entries, e.g. ``{"session.intra_op.allow_spinning": "0"}``; they win over ours.
        op_libraries: Further custom-op libraries to register.
        plugin: Register qpipe's own plugin library when it is built.
        optimized_model: Where ONNX Runtime writes the graph it actually runs, None for nowhere.
    """

    config: Mapping[str, str] = field(default_factory=dict)
    op_libraries: tuple[Path, ...] = ()
    plugin: bool = True
    optimized_model: Path | None = None


DEFAULT_EXTRAS = SessionExtras()


@functools.cache
def load_onnxruntime() -> ModuleType:
    """Import ONNX Runtime, quiet and without telemetry.

    Raises:
        EnvironmentError_: It is not installed, or its native library does not load.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise EnvironmentError_(
            "qpipe needs ONNX Runtime for this", found=str(error), expected="onnxruntime >= 1.28", do=INSTALL_LINE
        ) from error
    if not hasattr(ort, "InferenceSession"):
        raise EnvironmentError_(
            "the installed ONNX Runtime is damaged",
            found=f"{getattr(ort, '__file__', None) or 'a folder without a package'} has no InferenceSession",
            expected="exactly one of onnxruntime and onnxruntime-gpu",
            do=f"pip uninstall -y onnxruntime onnxruntime-gpu, then {INSTALL_LINE}",
        )
    ort.disable_telemetry_events()
    ort.set_default_logger_severity(_QUIET)
    return ort  # type: ignore[no-any-return]


@functools.cache
def ort_errors() -> tuple[type[Exception], ...]:
    """Return the exception types that ONNX Runtime raises; they share no base class of their own."""
    load_onnxruntime()
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = (item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception))
    return (*sorted(found, key=lambda item: item.__name__), RuntimeError, ValueError)


def make_session(
    model: Path | str | bytes | onnx.ModelProto,
    *,
    exact: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    extras: SessionExtras = DEFAULT_EXTRAS,
) -> onnxruntime.InferenceSession:
    """Open ``model`` for running.

    Args:
        model: A path (external data is found beside it), serialized bytes, or a ModelProto that holds its weights.
        exact: Run every operator as ONNX defines it instead of as deployed.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` (CUDA where it works; ask `session_device` what was taken).
        threads: Threads inside one operator; None leaves the choice to ONNX Runtime.
        extras: What few sessions need.

    Raises:
        EnvironmentError_: ONNX Runtime, the device, or a custom-op library is missing. Never a silent CPU session.
        ModelError: The file is no valid model.
        UnsupportedError: The model is sound, but this ONNX Runtime cannot run it.
        UsageError: No such file, or no such device name.
    """
    ort = load_onnxruntime()
    if device == "auto":
        device = "cuda" if cuda_works() else "cpu"
    source = _source(model)
    where = str(model) if isinstance(model, (Path, str)) else None
    options = session_options(exact=exact, threads=threads, extras=extras)
    try:
        session = ort.InferenceSession(source, options, providers=_providers(ort, device), enable_fallback=0)
    except ort_errors() as error:
        raise translate(error, where=where) from error
    # Falling back on a failed run would move the session to the CPU without a word.
    session.disable_fallback()
    if session_device(session) != device:
        raise _no_cuda("the CUDA provider does not load, most often for want of CUDA or cuDNN libraries")
    return session


def session_options(
    *, exact: bool = False, threads: int | None = None, extras: SessionExtras = DEFAULT_EXTRAS
) -> onnxruntime.SessionOptions:
    """Return the session options that `make_session` uses, plugin library included."""
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = _QUIET
    if threads is not None:
        options.intra_op_num_threads = threads
    if exact:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if extras.optimized_model is not None:
        options.optimized_model_filepath = str(extras.optimized_model)
    config = {ACCURACY_KEY: EXACT_ACCURACY_LEVEL if exact else DEPLOYED_ACCURACY_LEVEL, **extras.config}
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    for library in extras.op_libraries:
        _register(options, library)
    if extras.plugin:
        _register_plugin(options)
    return options


def session_device(session: onnxruntime.InferenceSession) -> str:
    """Return ``"cuda"`` or ``"cpu"``: what the session's first provider runs on."""
    first = session.get_providers()[0]
    return next((name for name, provider in PROVIDERS.items() if provider == first), first)


def session_facts(session: onnxruntime.InferenceSession) -> dict[str, Any]:
    """Return what decides a session's numerics, for reports: providers, optimization, accuracy level, threads."""
    options = session.get_session_options()
    return {
        "onnxruntime": load_onnxruntime().__version__,
        "providers": session.get_providers(),
        "graph_optimization": options.graph_optimization_level.name,
        "qdq_matmulnbits_accuracy_level": int(options.get_session_config_entry(ACCURACY_KEY)),
        "threads": options.intra_op_num_threads,
    }


def translate(error: Exception, *, where: str | None = None) -> QpipeError:
    """Turn an error of ONNX Runtime into one that says what to do."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).strip()
    for pattern, build in _TRANSLATIONS:
        if match := re.search(pattern, text):
            return build(match, where, text)
    if type(error).__name__ in ("NotImplemented", "EPFail"):
        return UnsupportedError("this ONNX Runtime cannot run the model", where=where, found=text)
    return ModelError("ONNX Runtime refuses the model", where=where, found=text)


def cuda_works() -> bool:
    """Whether a session on the CUDA provider really opens on this machine."""
    ort = load_onnxruntime()
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        return False
    try:
        make_session(_one_node_model(), device="cuda", extras=SessionExtras(plugin=False))
    except EnvironmentError_:
        return False
    return True


@functools.cache
def cpu_features() -> dict[str, bool]:
    """Return which instruction sets that matter to integer kernels this CPU has.

    Keys: ``avx2``, ``avx512f``, ``avx512_vnni``, ``avx_vnni``, ``amx_int8`` (x86), ``dotprod``, ``i8mm`` (Arm).
    On systems without /proc/cpuinfo all are False: nothing is claimed that was not seen.
    """
    text = _CPUINFO.read_text(encoding="utf-8", errors="replace") if _CPUINFO.is_file() else ""
    flags = set(re.findall(r"\w+", " ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE))))
    names = {"dotprod": "asimddp"}
    features = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "dotprod", "i8mm")
    return {feature: names.get(feature, feature) in flags for feature in features}


def has_vnni() -> bool:
    """Whether the CPU multiplies int8 into 32-bit sums without saturating in between (x86 VNNI or AMX)."""
    features = cpu_features()
    return features["avx512_vnni"] or features["avx_vnni"] or features["amx_int8"]


def int8_saturates() -> bool:
    """Whether fused int8 kernels clip intermediate sums here: x86 without VNNI. Seven-bit weights avoid it."""
    return platform.machine().lower() in ("x86_64", "amd64", "i686") and not has_vnni()


def _source(model: Path | str | bytes | onnx.ModelProto) -> str | bytes:
    if isinstance(model, bytes):
        return model
    if isinstance(model, (Path, str)):
        if not Path(model).is_file():
            raise UsageError("no such model file", where=str(model))
        return str(model)
    from google.protobuf.message import EncodeError

    try:
        return model.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise ModelError(
            "the model is too large to hand over in memory",
            found=str(error),
            expected="at most 2 GiB",
            do="save it with external data and give the path",
        ) from error


def _providers(ort: ModuleType, device: str) -> list[str]:
    if device not in PROVIDERS:
        raise UsageError(f"no device is called {device!r}", expected=", ".join((*PROVIDERS, "auto")))
    if device == "cpu":
        return [PROVIDERS["cpu"]]
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        raise _no_cuda(f"the installed ONNX Runtime {ort.__version__} is built without CUDA")
    # Finds the CUDA libraries of the nvidia-* packages; prints what it misses, which the check afterwards says better.
    _preload(ort)
    return [PROVIDERS["cuda"], PROVIDERS["cpu"]]


@functools.cache
def _preload(ort: ModuleType) -> None:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ort.preload_dlls()


def _no_cuda(found: str) -> EnvironmentError_:
    return EnvironmentError_("CUDA was asked for and is not usable", found=found, do=CUDA_LINE)


def _register(options: onnxruntime.SessionOptions, library: Path) -> None:
    try:
        options.register_custom_ops_library(str(library))
    except ort_errors() as error:
        raise EnvironmentError_("the custom-op library does not load", where=str(library), found=str(error)) from error


def _register_plugin(options: onnxruntime.SessionOptions) -> None:
    try:
        from .. import plugins
    except ImportError:
        return
    if hasattr(plugins, "is_built") and plugins.is_built():
        plugins.register(options)


def _one_node_model() -> bytes:
    from onnx import parser

    text = '<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) { y = Relu(x) }'
    return parser.parse_model(text).SerializeToString()


def _unknown_domain(match: re.Match[str], where: str | None, text: str) -> QpipeError:
    domain, op = match["domain"], match["op"]
    ours = domain.startswith("qpipe")
    return EnvironmentError_(
        f"operator {domain}::{op} needs a library that is not loaded",
        where=where,
        found=text,
        do="qpipe plugin build" if ours else "give the library that holds the operator: --custom-op-library FILE",
    )


def _unknown_op(match: re.Match[str], where: str | None, text: str) -> QpipeError:
    return ModelError(f"the model uses an operator {match['op']} that its opset does not have", where=where, found=text)


def _too_new(match: re.Match[str], where: str | None, text: str) -> QpipeError:
    version = load_onnxruntime().__version__
    return UnsupportedError(
        f"this ONNX Runtime ({version}) does not know the model's {match['kind']} yet",
        where=where,
        found=text[match.start() :],
        do="export at a lower opset, or pip install --upgrade the ONNX Runtime that you have",
    )


def _no_kernel(match: re.Match[str], where: str | None, text: str) -> QpipeError:
    return UnsupportedError(
        f"this ONNX Runtime ({load_onnxruntime().__version__}) has no kernel for {match['op']}",
        where=f"{where or 'model'}, node {match['node']!r}",
        found=text,
        do="use another number type or opset for this node; see qpipe doctor for what runs here",
    )


_TRANSLATIONS = (
    (r"(?P<domain>[\w.\-]+):(?P<op>\w+)\(-?\d+\) is not a registered function/op", _unknown_domain),
    (r"No Op registered for (?P<op>\w+) with domain_version", _unknown_op),
    (r"ONNX Runtime only \*guarantees\* support.*?(?P<kind>[Oo]pset)", _too_new),
    (r"Unsupported model (?P<kind>IR version).*", _too_new),
    (r"Could not find an implementation for (?P<op>\w+\(\d+\)) node with name '(?P<node>[^']*)'", _no_kernel),
)
