"""The onnx package's own models of one operator, and what becomes of them: quantized, kept with a reason, or refused.

Every model is taken twice: as it is shipped, where all arrays are inputs, and with all arrays but the first as
constants, which is where weights are.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from qpipe.calibrate.errors import QpipeError
from qpipe.pipeline.graph import save
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.session import make_session, ort_errors
from qpipe.pipeline.stages.quantize import needs_statistics
from qpipe.pipeline.workflow import Job
from quantizing import signature

TOLERANCE = 0.1
"""Largest error of an output, relative to its largest value, that 8 bits may cause in a model of one operator."""
_NEWEST = (25, 13)
"""Opset and IR version to which models with constants are stamped down, so that runtimes run them."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a model: ``quantized``, ``kept``, or ``refused`` with an exit code from 3 to 5."""

    kind: str
    detail: str = ""


def all_cases() -> list[Any]:
    """All test cases; making them takes half a minute."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(load_model_tests(kind="node"))


@functools.cache
def cases_of(module: str) -> tuple[Any, ...]:
    """The test cases that one module of the onnx package makes when it is imported."""
    from onnx.backend.test.case import node

    before = len(node._NodeTestCases)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(f"onnx.backend.test.case.node.{module}")
    return tuple(node._NodeTestCases[before:])


def outcome(case: Any, folder: Path, scheme: str, *, constant: bool) -> Outcome:
    """Take one model from file to file; what is no `Outcome` is an exception, and a fault.

    Raises:
        AssertionError: The result is invalid, has another interface, does not run, or is far from the float model.
    """
    source, batches = _with_constants(case) if constant else (case.model, _batches(case))
    recipe = make_recipe(scheme=scheme)
    onnx.save(source, folder / "float.onnx")
    try:
        job = Job.open(folder / "float.onnx", convert=True)
        statistics = job.collect(batches, tensors=job.needed(recipe)) if needs_statistics(recipe) else None
        done = job.quantize(recipe, statistics)
    except QpipeError as error:
        if error.exit_code not in (3, 4, 5):
            raise
        return Outcome(f"refused {error.exit_code}", error.what)
    save(done.model, folder / "int8.onnx", force=True)
    _require_sound(folder, batches)
    reasons = sorted({d.reason for d in done.plan.decisions if d.spec is None})
    assert done.plan.coded() or reasons or not source.graph.node
    return Outcome("quantized" if done.plan.coded() else "kept", "; ".join(reasons))


def _require_sound(folder: Path, batches: list[dict[str, Any]]) -> None:
    source, result = (onnx.load(folder / f"{name}.onnx") for name in ("float", "int8"))
    assert signature(result) == signature(source)
    onnx.checker.check_model(result, full_check=_passes_in_full(source))
    for exact in (True, False):
        try:
            wanted = [make_session(folder / "float.onnx", exact=exact).run(None, batch) for batch in batches]
        except (QpipeError, *ort_errors()):  # what does not run as it was shipped need not run afterwards
            continue
        session = make_session(folder / "int8.onnx", exact=exact)
        for batch, outputs in zip(batches, wanted, strict=True):
            for one, other in zip(outputs, session.run(None, batch), strict=True):
                _require_close(one, other)


def _passes_in_full(source: onnx.ModelProto) -> bool:
    """Whether a model passes the checks of shapes and types; some of the shipped ones do not."""
    try:
        onnx.checker.check_model(source, full_check=True)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError):
        return False
    return True


def _require_close(one: Any, other: Any) -> None:
    if not isinstance(one, np.ndarray) or one.dtype.kind != "f" or not one.size:
        return
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    finite = np.isfinite(one)
    if finite.any():
        gap = np.abs(one[finite].astype(np.float64) - other[finite].astype(np.float64)).max()
        assert gap <= TOLERANCE * max(np.abs(one[finite].astype(np.float64)).max(), 1e-9), gap


def _with_constants(case: Any) -> tuple[onnx.ModelProto, list[dict[str, Any]]]:
    """All arrays but the first become initializers, at versions that runtimes know."""
    source, batches = onnx.ModelProto(), _batches(case)
    source.CopyFrom(case.model)
    source.ir_version = max(min(source.ir_version, _NEWEST[1]), 4)
    for entry in source.opset_import:
        entry.version = min(entry.version, _NEWEST[0]) if entry.domain == "" else entry.version
    for index in range(len(source.graph.input) - 1, 0, -1):
        name = source.graph.input[index].name
        value = batches[0].get(name) if batches else None
        if isinstance(value, np.ndarray) and value.dtype.kind not in "OUS":
            source.graph.initializer.append(numpy_helper.from_array(value, name))
            del source.graph.input[index]
            batches = [{key: held for key, held in batch.items() if key != name} for batch in batches]
    return source, batches


def _batches(case: Any) -> list[dict[str, Any]]:
    names = [entry.name for entry in case.model.graph.input]
    return [
        {name: _value(given) for name, given in zip(names, inputs, strict=False) if given is not None}
        for inputs, _ in case.data_sets or []
    ]


def _value(given: Any) -> Any:
    if isinstance(given, onnx.TensorProto):
        return numpy_helper.to_array(given)
    if isinstance(given, onnx.SequenceProto):
        return [numpy_helper.to_array(tensor) for tensor in given.tensor_values]
    return given if isinstance(given, list | onnx.OptionalProto) else np.asarray(given)
