"""``qpipe calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...calibrate.errors import UsageError
from . import output
from .options import CUSTOM_OPS, DEVICE, FORCE, HARDLINKS, INLINE, JSON, MAX_MEMORY, QUIET, UPGRADE, data_options

if TYPE_CHECKING:
    from ..calibration import Calibration

FORMS = ("ort-json", "ort-flatbuffers", "ort-text", "trt-cache")


@click.command("calibrate", short_help="Store what the activations of a model were.")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--output", "output_path", type=click.Path(path_type=Path), help="Statistics file to write.")
@data_options
@click.option("--resume", is_flag=True, help="Go on from the output file; the data must be the same.")
@click.option("--merge", multiple=True, type=click.Path(path_type=Path), metavar="FILE", help="Merge these files.")
@click.option(
    "--save-every", type=click.IntRange(min=1), metavar="N", help="Save every N batches, not only every 30 s."
)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes; same result.")
@click.option("--cluster", metavar="WHERE", help="Run the workers on dask:ADDRESS of a scheduler, ray, or ray:ADDRESS.")
@click.option(
    "--detail",
    type=click.Choice(["none", "channels", "gram", "auto"]),
    default="channels",
    show_default=True,
    help="What to keep of layer inputs: magnitudes per channel, or XᵀX too (GPTQ, AWQ), or that where it stays small.",
)
@click.option(
    "--tensors",
    type=click.Choice(["static", "all"]),
    default="static",
    show_default=True,
    help="Which to keep: those that static schemes turn to codes and that layers read, or any that a rule may ask for "
    "(fp16, symmetric activations before a Relu).",
)
@click.option("--allow-nonfinite", is_flag=True, help="Accept activations that are NaN or infinite.")
@click.option(
    "--sentinel",
    type=click.FloatRange(min=0, min_open=True),
    help="Magnitude from which values are masks, in no range.  [default: 1e30; 6e4 for float16]",
)
@MAX_MEMORY
@click.option("--emit", multiple=True, type=click.Choice(FORMS), help="Also write a table for another tool.")
@click.option("--method", default="minmax", show_default=True, help="Method of the ranges that --emit writes.")
@UPGRADE
@INLINE
@CUSTOM_OPS
@HARDLINKS
@DEVICE
@FORCE
@JSON
@QUIET
def command(model: Path | None, output_path: Path | None, **given: Any) -> None:
    """Run MODEL over data once. Every calibration method is solved from the file later, without running again."""
    if output_path is None:
        raise UsageError("no output was named", expected="-o FILE", do="qpipe calibrate m.onnx --data d.npz -o m.qcal")
    calibration = _merged(given["merge"]) if given["merge"] else _collected(model, output_path, given)
    if given["merge"]:
        from ..calibration import save

        save(calibration, output_path, force=given["force"])
    written = [output_path, *_tables(calibration, output_path, given)]
    output.emit(
        {
            "written": [str(p) for p in written],
            "samples": calibration.samples,
            "skipped": calibration.skipped,
            "tensors": len(calibration.tensors),
            "not_covered": dict(calibration.not_covered),
        },
        given["as_json"],
        []
        if given["quiet"]
        else [
            f"wrote {output_path} ({output_path.stat().st_size / 1e6:.1f} MB): {calibration.samples} samples, "
            f"{len(calibration.tensors)} tensors",
            f"look at it: qpipe inspect {output_path}",
            *(f"wrote {path}" for path in written[1:]),
        ],
    )


def _collected(model: Path | None, target: Path, given: dict[str, Any]) -> Calibration:
    from ..stages.collect import Checkpoints
    from .collecting import collect_statistics, open_job

    if model is None:
        raise UsageError(
            "no model was named", expected="qpipe calibrate MODEL --data DATA -o FILE, or --merge FILE ..."
        )
    checkpoints = Checkpoints(path=target, resume=given["resume"], force=given["force"], batches=given["save_every"])
    try:
        job = open_job(model, given)
        return collect_statistics(job, given, job.wanted() if given["tensors"] == "all" else job.needed(), checkpoints)
    except KeyboardInterrupt:
        output.note(f"what was collected is in {target}; go on with --resume")
        raise


def _merged(paths: tuple[Path, ...]) -> Calibration:
    from ..calibration import load

    result = load(paths[0])
    for path in paths[1:]:
        result = result.merge(load(path))
    return result


def _tables(calibration: Calibration, target: Path, given: dict[str, Any]) -> list[Path]:
    from ...calibrate.formats import FORMATS
    from ...calibrate.qarray import Spec
    from ...calibrate.ranges import resolve
    from ..calibration import write_table

    suffixes = dict(zip(FORMS, (".json", ".flatbuffers", ".txt", ".cache"), strict=True))
    if not given["emit"]:
        return []
    method, spec = resolve(given["method"]), Spec(format=FORMATS.get("int8"), narrow_range=True)
    ranges = {name: method(stats.histogram, spec) for name, stats in calibration.tensors.items()}
    written = []
    for form in given["emit"]:
        path = target.with_suffix(suffixes[form])
        write_table(ranges, path, form, force=given["force"])
        written.append(path)
    return written
