"""``qpipe check``."""

from __future__ import annotations

from pathlib import Path

import click

from ...calibrate.errors import ModelError
from . import output
from .options import JSON, MODEL


@click.command("check", short_help="Check a model.")
@MODEL
@click.option("--target", help="Also hold the model against what this target demands.")
@click.option("--allow-hardlinks", is_flag=True, help="Accept data files that have other names elsewhere.")
@JSON
def command(model: Path, target: str | None, allow_hardlinks: bool, as_json: bool) -> None:
    """Check MODEL: file safe, ONNX valid, scales and zero points sound. Errors give exit code 3."""
    from ..graph import load
    from ..qdq_check import check_qdq

    findings = check_qdq(load(model, allow_hardlinks=allow_hardlinks), target=target)
    errors = [f for f in findings if f.severity == "error"]
    lines = [f"{model}: {len(errors)} errors, {len(findings) - len(errors)} warnings"]
    lines += [
        f"{f.severity}: {f.rule}: {f.node or f.tensor}: found {f.found}, expected {f.expected}. {f.do}"
        for f in findings
    ]
    output.emit({"model": str(model), "findings": [f.to_dict() for f in findings]}, as_json, lines)
    if errors:
        raise ModelError(
            f"the model breaks {len({f.rule for f in errors})} rules",
            where=str(model),
            found=f"{len(errors)} errors, the first at {errors[0].node or errors[0].tensor}",
            do=errors[0].do,
        )
