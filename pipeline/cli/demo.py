"""``qpipe demo``: the whole job on the reference models."""

from __future__ import annotations

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
    """Return the comparison as lines of text."""
    headers = ["model", "configuration", "MB", "metrics (exact semantics)", "as deployed here", "SQNR dB", "deployed",
               "cosine", "deployed", "speed"]  # fmt: skip
    cells = [
        [row.model, row.config, "-", row.error, "", "", "", "", "", ""]
        if row.error
        else [
            row.model,
            row.config,
            f"{row.megabytes:.1f}",
            _metrics(row.metrics),
            _metrics(row.deployed),
            *(f"{value:.1f}" if abs(value) != float("inf") else "-" for value in row.sqnr_db),
            *(f"{value:.4f}" for value in row.cosine),
            f"{row.speed:.2f}x",
        ]
        for row in rows
    ]
    return [*output.table(headers, cells), "", "speed: time of the float model over time of this one, in the same run"]


def _metrics(metrics: Any) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
