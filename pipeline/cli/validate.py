"""``qpipe validate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import output
from .options import CUSTOM_OPS, DEVICE, FORCE, HARDLINKS, JSON, QUIET, data_options, feed_from

if TYPE_CHECKING:
    from ..validation import ValidateOptions

THRESHOLDS = ("min_cosine", "min_sample_cosine", "min_sqnr_db", "max_abs", "min_top1", "max_kld")
_TEXT = {
    "min_cosine": "Smallest cosine of each output to float.",
    "min_sample_cosine": "Smallest cosine of any sample.",
    "min_sqnr_db": "Smallest signal to noise ratio of each output, dB.",
    "max_abs": "Largest absolute difference of any value.",
    "min_top1": "Smallest share of rows whose largest score is at the same place.",
    "max_kld": "Largest mean KL divergence of score outputs.",
}


def _threshold_options(function: Any) -> Any:
    for name in reversed(THRESHOLDS):
        function = click.option(f"--{name.replace('_', '-')}", name, type=float, help=_TEXT[name])(function)
    return function


@click.command("validate", short_help="Compare a quantized model with its float model.")
@click.argument("float_model", type=click.Path(path_type=Path))
@click.argument("quantized_model", type=click.Path(path_type=Path))
@data_options
@_threshold_options
@click.option("--judge", multiple=True, type=click.Choice(["exact", "deployed"]), help="What thresholds apply to.")
@click.option("--per-layer", is_flag=True, help="Compare inner activations too, the worst layer first.")
@click.option(
    "--layer-by-layer", is_flag=True, help="The same with one layer of each model in memory at a time; exact only."
)
@click.option("--logits", multiple=True, metavar="OUTPUT", help="This output holds scores.")
@click.option("--report", type=click.Path(path_type=Path), help="Write a report: .html, .json or .txt.")
@click.option("--save-inputs", type=click.Path(path_type=Path), help="Write the inputs in polygraphy's format.")
@click.option("--save-outputs", type=click.Path(path_type=Path), help="Write the outputs in polygraphy's format.")
@click.option(
    "--saved-run",
    type=click.Choice(["deployed", "exact", "float"]),
    default="deployed",
    show_default=True,
    help="Whose outputs --save-outputs writes.",
)
@click.option("--rounds", type=click.IntRange(min=0), default=5, show_default=True, help="Rounds of timing.")
@CUSTOM_OPS
@HARDLINKS
@DEVICE
@FORCE
@JSON
@QUIET
def command(float_model: Path, quantized_model: Path, **given: Any) -> None:
    """Run both models on the same data and say how far apart they are.

    "exact" runs every operator as ONNX defines it and judges the model; "deployed" runs ONNX Runtime's fused integer
    kernels and judges model and machine together. A threshold that is not kept gives exit code 1.
    """
    from ..data import inputs_of
    from ..graph import load
    from ..report import to_text
    from ..stages.validate import validate

    graph = load(float_model, allow_hardlinks=given["allow_hardlinks"]).graph
    feed = feed_from(given, inputs_of(graph))
    with output.progress("validating", given["samples"], quiet=given["quiet"]) as advance:
        report = validate(float_model, quantized_model, feed, _options(given, lambda done: advance(done, "")))
    if given["report"]:
        from ..report_file import save_report

        save_report(report, given["report"], force=given["force"])
        output.note(f"wrote {given['report']}")
    output.emit(report.to_dict(), given["as_json"], to_text(report, output.width()).splitlines())
    report.require()


def _options(given: dict[str, Any], progress: Any) -> ValidateOptions:
    from ..validation import Thresholds, ValidateOptions

    return ValidateOptions(
        thresholds=Thresholds(**{name: given[name] for name in THRESHOLDS if given[name] is not None}),
        judge=given["judge"] or ("exact",),
        per_layer=given["per_layer"],
        layer_by_layer=given["layer_by_layer"],
        logits=given["logits"],
        device=given["device"],
        op_libraries=given["custom_op_library"],
        allow_hardlinks=given["allow_hardlinks"],
        save_inputs=given["save_inputs"],
        save_outputs=given["save_outputs"],
        saved_run=given["saved_run"],
        force=given["force"],
        rounds=given["rounds"],
        progress=progress,
    )
