"""Make an ONNX Runtime session the one right way.

Two kinds of session exist. *Exact* runs every operator as ONNX defines it: graph optimizations off, so that no
Q/DQ pair is fused into an integer kernel. *Deployed* is what a user of ONNX Runtime gets by default: fused integer
kernels, which saturate 16-bit sums on x86 CPUs without VNNI, and weight-only products whose activations are rounded
to int8 (accuracy level 4). Both are measured by `validate`, apart.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..calibrate.errors import EnvironmentError_, ModelError, PluginError, UsageError
from .cpu import cpu_features, has_vnni, int8_saturates
from .runtime import load_onnxruntime, ort_errors, translate

if TYPE_CHECKING:
    import onnx
    import onnxruntime

CUDA_LINE = "pip install 'onnxruntime-gpu[cuda,cudnn]', or leave out --device cuda; see qpipe doctor"

ACCURACY_KEY = "session.qdq_matmulnbits_accuracy_level"
EXACT_ACCURACY_LEVEL = "1"
"""Activations of fused weight-only products stay float32."""
DEPLOYED_ACCURACY_LEVEL = "4"
"""ONNX Runtime's own default: activations of fused weight-only products are rounded to int8."""

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_QUIET = 4
_LOG = logging.getLogger(__name__)

__all__ = [
    "SessionExtras",
    "cpu_features",
    "cuda_works",
    "has_vnni",
    "int8_saturates",
    "load_onnxruntime",
    "make_session",
    "ort_errors",
    "plugin_status",
    "provider_error",
    "session_device",
    "session_facts",
    "session_options",
    "translate",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionExtras:
    """What few sessions need beside the usual.

    Attributes:
        config: Session configuration entries, e.g. ``{"session.intra_op.allow_spinning": "0"}``; they win over ours.
        op_libraries: Further custom-op libraries to register.
        plugin: Register qpipe's own plugin library when it is built.
        mapped: Leave weights in their files: nothing is packed, and what depends on weights only is computed when it
            is read and let go afterwards. Only an *exact* session folds no copies of them beforehand.
        ragged: Inputs change shape from run to run: keep no plan of the memory per shape.
        eager: Run every operator as soon as it can, also one that nobody waits for: what it reads is in the cache then.
        optimized_model: Where ONNX Runtime writes the graph it actually runs, None for nowhere.
        profile: Start of the name of the file in which ONNX Runtime notes what each operator took, None for none.
    """

    config: Mapping[str, str] = field(default_factory=dict)
    op_libraries: tuple[Path, ...] = ()
    plugin: bool = True
    mapped: bool = False
    ragged: bool = False
    eager: bool = False
    optimized_model: Path | None = None
    profile: Path | None = None


DEFAULT_EXTRAS = SessionExtras()
NO_PLUGIN = SessionExtras(plugin=False)


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
    options.enable_mem_pattern = not extras.ragged
    if extras.optimized_model is not None:
        options.optimized_model_filepath = str(extras.optimized_model)
    if extras.profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(extras.profile)
    config = {ACCURACY_KEY: EXACT_ACCURACY_LEVEL if exact else DEPLOYED_ACCURACY_LEVEL, **extras.config}
    if extras.eager or extras.mapped:  # if not, all constants are computed first, and held
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if extras.mapped:
        config["session.disable_prepacking"] = "1"
        options.enable_cpu_mem_arena = False
        if exact:
            # A DequantizeLinear with several readers is doubled otherwise, and its doubles come after all constants.
            config["session.disable_quant_qdq"] = "1"
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
        "plugin": plugin_status(),
    }


def provider_error(provider: str) -> str | None:
    """Open a session of one node on ``provider``; return None when it works, else why it does not."""
    ort = load_onnxruntime()
    if provider not in ort.get_available_providers():
        return f"the installed ONNX Runtime {ort.__version__} is built without it"
    if provider != PROVIDERS["cpu"]:
        _preload(ort)
    wanted = list(dict.fromkeys((provider, PROVIDERS["cpu"])))
    try:
        session = ort.InferenceSession(
            _one_node_model(), session_options(extras=NO_PLUGIN), providers=wanted, enable_fallback=0
        )
    except ort_errors() as error:
        return str(error).rpartition("&)")[2].strip() or str(error)
    return None if session.get_providers()[0] == provider else "its libraries do not load; the session went to the CPU"


def cuda_works() -> bool:
    """Whether a session on the CUDA provider really opens on this machine."""
    return provider_error(PROVIDERS["cuda"]) is None


def _source(model: Path | str | bytes | onnx.ModelProto) -> str | bytes:
    if isinstance(model, bytes):
        return model
    if isinstance(model, (Path, str)):
        if not Path(model).is_file():
            raise UsageError("no such model file", where=str(model))
        return str(model)
    from google.protobuf.message import EncodeError

    try:
        return bytes(model.SerializeToString())
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
    from .. import plugins

    try:
        if plugins.is_built():
            plugins.register(options)
    except PluginError as error:
        # Most models need no plugin, and those of qpipe carry a body of standard operators to fall back on.
        _LOG.warning("running without the plugin library: %s", error)


def plugin_status() -> str:
    """Return ``"registered"``, ``"not built"``, or why the built library does not load."""
    from .. import plugins

    if not plugins.is_built():
        return "not built"
    try:
        plugins.register(load_onnxruntime().SessionOptions())
    except PluginError as error:
        return str(error)
    return "registered"


def _one_node_model() -> bytes:
    from onnx import parser

    text = '<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) { y = Relu(x) }'
    return bytes(parser.parse_model(text).SerializeToString())
