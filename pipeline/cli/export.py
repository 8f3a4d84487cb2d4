"""``qpipe export``."""

from __future__ import annotations

from pathlib import Path

import click

from . import output
from .options import FORCE, JSON, OUTPUT


@click.command("export", short_help="Export a PyTorch model to ONNX.")
@click.argument("source")
@OUTPUT
@click.option("--input", "inputs", multiple=True, metavar="NAME=1,3,8[:DTYPE]", help="Shape of an example input.")
@click.option("--dynamic", multiple=True, metavar="NAME:0=batch", help="Axes of an input that vary, by name.")
@click.option("--opset", type=click.IntRange(min=18, max=25), default=20, show_default=True, help="Operator set.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1e-3,
    show_default=True,
    help="Largest difference to PyTorch allowed, relative to each output's magnitude.",
)
@FORCE
@JSON
def command(
    source: str,
    output_path: Path,
    inputs: tuple[str, ...],
    dynamic: tuple[str, ...],
    opset: int,
    **options: object,
) -> None:
    """Export SOURCE to ONNX, run both, and refuse a result that differs.

    SOURCE is file.py:factory, package.module:factory, model.pt2 or a local Hugging Face folder. The factory returns a
    module and example inputs, or a module when --input describes them.
    """
    from ..sources import resolve_source
    from ..stages.export import export

    exportable = resolve_source(source, inputs, dynamic)
    result = export(
        exportable,
        output_path,
        opset=opset,
        tolerance=float(str(options["tolerance"])),
        force=bool(options["force"]),
    )
    size = sum(p.stat().st_size for p in (result.path, result.path.with_name(f"{result.path.name}.data")) if p.exists())
    output.emit(
        {
            "path": str(result.path),
            "bytes": size,
            "opset": result.opset,
            "max_difference": result.max_difference,
            "relative_difference": result.relative,
        },
        bool(options["as_json"]),
        [
            f"wrote {result.path} ({size / 1e6:.1f} MB, opset {result.opset})",
            f"checked: max |torch - onnx| = {result.max_difference:.1e} over {result.outputs} output(s)",
        ],
    )
