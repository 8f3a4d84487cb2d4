"""ONNX Runtime itself: importing it, and turning its errors into ours."""

from __future__ import annotations

import functools
import re
from types import ModuleType

from ..calibrate.errors import EnvironmentError_, ModelError, QpipeError, UnsupportedError

INSTALL_LINE = "pip install 'qpipe[cpu]' (any machine) or pip install 'qpipe[gpu]' (NVIDIA GPU)"
_QUIET = 4


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


def translate(error: Exception, *, where: str | None = None) -> QpipeError:
    """Turn an error of ONNX Runtime into one that says what to do."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).strip()
    for pattern, build in _TRANSLATIONS:
        if match := re.search(pattern, text):
            return build(match, where, text)
    if type(error).__name__ in ("NotImplemented", "EPFail"):
        return UnsupportedError("this ONNX Runtime cannot run the model", where=where, found=text)
    return ModelError("ONNX Runtime refuses the model", where=where, found=text)


def _unknown_domain(match: re.Match[str], where: str | None, text: str) -> QpipeError:
    domain, op = match["domain"], match["op"]
    ours = domain.startswith("qpipe")
    return EnvironmentError_(
        f"operator {domain}::{op} needs a library that is not loaded",
        where=where,
        found=text,
        do="qpipe plugin build"
        if ours
        else "give the library that holds the operator: --custom-op-library FILE; without it, "
        "qpipe quantize --scheme w8 stores weights alone and runs nothing",
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
