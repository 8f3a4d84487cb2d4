"""``qpipe inspect``."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click

from ...calibrate.errors import UsageError
from . import output
from .options import FORCE, JSON

TABLES = (".json", ".flatbuffers", ".txt", ".cache")
_REST = 160  # characters beside a tensor's name


@click.command("inspect", short_help="Show what is in a model or a statistics file.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every stored tensor.")
@click.option("--report", type=click.Path(path_type=Path), help="Write a report with histograms (.html, .json, .txt).")
@click.option("--limit", type=click.IntRange(min=1), default=40, show_default=True, help="Rows of long lists.")
@FORCE
@JSON
def command(file: Path, **given: Any) -> None:
    """Show FILE: a model (.onnx), statistics (.qcal), or a calibration table of ONNX Runtime or TensorRT.

    Weights are never loaded.
    """
    if file.suffix == ".qcal":
        _statistics(file, given)
    elif file.suffix in TABLES:
        _table(file, given)
    else:
        _model(file, given)


def _model(file: Path, given: dict[str, Any]) -> None:
    from ..graph import load
    from ..inspect import inspect_model

    facts = inspect_model(load(file))
    operators = sorted(facts.operators.items(), key=lambda item: -item[1])
    lines = [
        f"{file}: opset {_opsets(facts.opsets)}, IR {facts.ir_version}, {facts.producer or 'unknown producer'}",
        f"inputs : {', '.join(facts.inputs)}",
        f"outputs: {', '.join(facts.outputs)}",
        f"nodes  : {facts.nodes} ({', '.join(f'{op} {n}' for op, n in operators[:12])})",
        f"weights: {facts.parameters:,} parameters, {facts.bits_per_weight:.2f} bits per weight, "
        f"{_size(facts.file_bytes)} on disk",
        f"memory : {memory_line(facts.memory_by_precision)}",
    ]
    lines += [f"{key}: {value}" for key, value in sorted(facts.metadata.items())]
    if facts.quantized:
        kinds = Counter((q.op, ", ".join(q.inputs), q.output) for q in facts.quantized)
        rows = [[count, *kind] for kind, count in kinds.most_common(given["limit"])]
        lines += ["", *output.table(["nodes", "quantized operator", "inputs", "output"], rows)]
    if given["tensors"]:
        rows = [[t.name, t.type, list(t.shape), t.bytes] for t in facts.tensors]
        lines += ["", *output.table(["tensor", "type", "shape", "bytes"], rows)]
    output.emit(facts.to_dict(), given["as_json"], lines)


def _opsets(opsets: dict[str, int]) -> str:
    return ", ".join(str(v) if name in ("", "ai.onnx") else f"{name} {v}" for name, v in sorted(opsets.items()))


def memory_line(memory: dict[str, float]) -> str:
    """Return what the weights weigh in each precision, in a line."""
    return ", ".join(f"{name} {_size(size)}" for name, size in memory.items())


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _table(file: Path, given: dict[str, Any]) -> None:
    from ..calibration import read_table

    ranges = {name: (float(rng.lo), float(rng.hi)) for name, rng in read_table(file).items()}
    rows = [[name, f"{lo:.6g}", f"{hi:.6g}"] for name, (lo, hi) in ranges.items()]
    lines = [f"{file}: ranges of {len(rows)} tensors", *output.table(["tensor", "min", "max"], rows)]
    output.emit({"ranges": ranges}, given["as_json"], lines)


def _statistics(file: Path, given: dict[str, Any]) -> None:
    from ..calibration import load
    from ..inspect_calibration import calibration_report, inspect_calibration
    from ..report import to_text

    if not file.is_file():
        raise UsageError("no such file", where=str(file), expected="a statistics file written by qpipe calibrate")
    calibration = load(file)
    rows = inspect_calibration(calibration)
    report = calibration_report(calibration, rows, title=str(file))
    if given["report"]:
        from ..report_file import save_report

        save_report(report, given["report"], force=given["force"])
        output.note(f"wrote {given['report']}")
    data = {**report.to_dict(), "rows": [row.to_dict() for row in rows]}
    names = max((len(row.tensor) for row in rows), default=0)
    width = output.width() if sys.stdout.isatty() else names + _REST  # whoever reads lines wants names in one piece
    output.emit(data, given["as_json"], to_text(report, width).splitlines())
