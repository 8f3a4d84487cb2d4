"""Runtimes by name, each as a function from a model and its inputs to its outputs.

An engine that is not installed raises `Missing`; one that cannot run a model raises whatever it raises.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
Engine = Callable[[onnx.ModelProto, Feeds], list[Array]]

PACKAGES = {
    "reference": "onnx",
    "ort-exact": "onnxruntime",
    "ort-deployed": "onnxruntime",
    "ort-default": "onnxruntime",
    "openvino": "openvino",
    "tract": "tract",
}


class Missing(Exception):
    """The engine is not installed here; the message is the line that installs it."""


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        line = "pip install 'qpipe[conformance]'" if name in ("openvino", "tract") else f"pip install {name}"
        raise Missing(f"{name} is not installed: {line}") from error


def version(engine: str) -> str | None:
    """Return the version of an engine's package, None when it is not installed."""
    names = [PACKAGES[engine]] + ["onnxruntime-gpu"] * (PACKAGES[engine] == "onnxruntime")
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _reference(model: onnx.ModelProto, feeds: Feeds) -> list[Array]:
    evaluator = importlib.import_module("onnx.reference").ReferenceEvaluator(model)
    with np.errstate(all="ignore"):
        return list(evaluator.run(None, dict(feeds)))


def _ort(level: str, accuracy: str | None) -> Engine:
    def run(model: onnx.ModelProto, feeds: Feeds) -> list[Array]:
        ort = _package("onnxruntime")
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        if accuracy:
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", accuracy)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return list(session.run(None, dict(feeds)))

    return run


def _openvino(model: onnx.ModelProto, feeds: Feeds) -> list[Array]:
    core = _package("openvino").Core()
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", hints)
    results = compiled(dict(feeds))
    return [np.asarray(results[output]) for output in compiled.outputs]


def _tract(model: onnx.ModelProto, feeds: Feeds) -> list[Array]:
    os.environ["RUST_LIB_BACKTRACE"] = "0"  # else every refusal walks and prints the stack
    tract = _package("tract")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        runnable = tract.onnx().load(path).into_model().into_runnable()
        outputs = runnable.run([np.ascontiguousarray(feeds[i.name]) for i in model.graph.input])
        return [output.to_numpy() for output in outputs]


ENGINES: dict[str, Engine] = {
    "reference": _reference,
    "ort-exact": _ort("ORT_DISABLE_ALL", "1"),
    "ort-deployed": _ort("ORT_ENABLE_ALL", "1"),
    "ort-default": _ort("ORT_ENABLE_ALL", None),
    "openvino": _openvino,
    "tract": _tract,
}
"""``ort-deployed`` is what qpipe sets up for deployment: all optimizations, and weight-only products in float32
(accuracy level 1); ``ort-default`` is ONNX Runtime without that option."""
