"""``qpipe demo``: the whole job on the reference models."""

from __future__ import annotations

import itertools
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import click

from . import output
from .options import JSON

NAMES = ("digits_cnn", "tiny_gpt", "minilm")


@click.command("demo", short_help="Run the whole job on reference models.")
@click.argument("models", nargs=-1, type=click.Choice(NAMES))
@click.option("--keep", type=click.Path(path_type=Path), help="Keep all files in this folder.")
@JSON
def command(models: tuple[str, ...], keep: Path | None, as_json: bool) -> None:
    """Export, calibrate, quantize and validate MODELS (all three without a name), beside ONNX Runtime's own tools."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        _run(models or NAMES, keep, as_json)
        return
    with tempfile.TemporaryDirectory(prefix="qpipe-demo-") as folder:
        _run(models or NAMES, Path(folder), as_json)


def _run(models: tuple[str, ...], folder: Path, as_json: bool) -> None:
    import dataclasses
    import logging

    from ...models.comparison import PEERS, Row, Subject, compare, qpipe

    logging.disable(logging.WARNING)  # the peers advise on their own options
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for name in models:
        output.note(f"{name}: export, calibrate, quantize, validate")
        rows += compare(Subject.export(name, folder), {**PEERS, "qpipe w8a8": qpipe(scheme="w8a8")})
    output.emit({"rows": [dataclasses.asdict(row) for row in rows]}, as_json, table(rows))


def table(rows: list[Any]) -> list[str]:
    """Return the comparison as lines of text: a block per model, its metrics once exact and once as deployed."""
    lines: list[str] = []
    for model in dict.fromkeys(row.model for row in rows):
        lines += [*_block(model, [row for row in rows if row.model == model]), ""]
    return [*lines, "speed: time of the float model over time of this one, in the same run"]


def _block(model: str, rows: list[Any]) -> list[str]:
    metrics = list(next((row.metrics for row in rows if not row.error), {}))
    measures = [*(name.replace("_at_", "@").replace("_", " ") for name in metrics), "SQNR dB", "cosine"]
    cells = [[row.config, *_cells(row, metrics)] for row in rows]
    lines = output.table([model, "MB", *measures, *measures, "speed"], cells)
    starts = list(itertools.accumulate((len(dashes) + 2 for dashes in lines[1].split()), initial=0))
    exact, deployed = starts[2], starts[2 + len(measures)]
    above = f"{'exact semantics':<{deployed - exact}}as deployed here".rjust(deployed + len("as deployed here"))
    failed = [f"{row.config}: {row.error}" for row in rows if row.error]
    return [above, *lines, *failed]


def _cells(row: Any, metrics: list[str]) -> list[str]:
    if row.error:
        return ["-"] * (2 * len(metrics) + 6)
    cells = [f"{row.megabytes:.1f}"]
    for i, values in enumerate((row.metrics, row.deployed)):
        cells += [f"{values[name]:.4f}" if abs(values[name]) < 10 else f"{values[name]:.2f}" for name in metrics]
        cells += [f"{row.sqnr_db[i]:.1f}" if math.isfinite(row.sqnr_db[i]) else "-", f"{row.cosine[i]:.4f}"]
    return [*cells, f"{row.speed:.2f}x"]
