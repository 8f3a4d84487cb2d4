"""A quantized model through the `validate` stage, from file to file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from qpipe.pipeline import graph
from qpipe.pipeline.report import Report
from qpipe.pipeline.stages.validate import ValidateOptions, validate
from qpipe.pipeline.validation import Thresholds
from quantizing import Batch, Result


def validated(found: Result, batches: Sequence[Batch], folder: Path, **thresholds: float) -> Report:
    """Validate against the float model; every output has to be compared, be finite and keep the thresholds.

    Args:
        found: Both models.
        batches: What they run on.
        folder: Where their files are written.
        **thresholds: As `Thresholds`, for exact semantics.

    Raises:
        ThresholdError: A threshold is not kept.
    """
    onnx.save(found.source, folder / "float.onnx")
    graph.save(found.result.model, folder / "int8.onnx")
    options = ValidateOptions(thresholds=Thresholds(**thresholds), rounds=0)
    report = validate(folder / "float.onnx", folder / "int8.onnx", batches, options)
    rows = report.table("outputs").rows
    assert {row["output"] for row in rows} == {entry.name for entry in found.source.graph.output}
    assert not any(row["mismatched"] or row["nonfinite"] for row in rows)
    report.require()
    return report
