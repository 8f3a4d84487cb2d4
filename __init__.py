"""qpipe: quantize ONNX models, right by default, explained and proven.

The public functions and records are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC: dict[str, str] = {
    "Calibration": "pipeline.calibration",
    "Exportable": "pipeline.exportable",
    "Job": "pipeline.workflow",
    "Plan": "pipeline.plan",
    "QpipeError": "calibrate.errors",
    "Recipe": "pipeline.recipe",
    "check_qdq": "pipeline.qdq_check",
    "collect": "pipeline.stages.collect",
    "export": "pipeline.stages.export",
    "load": "pipeline.graph",
    "make_recipe": "pipeline.recipe",
    "quantize_file": "pipeline.workflow",
    "save": "pipeline.graph",
    "validate": "pipeline.stages.validate",
}
"""Public name -> the module that holds it."""

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qpipe' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
