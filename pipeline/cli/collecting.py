"""Statistics for a command: read from a file, or collected from the data options."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import output
from .options import feed_from

if TYPE_CHECKING:
    from ..calibration import Calibration
    from ..recipe import Recipe
    from ..stages.collect import Checkpoints
    from ..stages.sequential import Data
    from ..workflow import Job

_NAMED = 3  # tensors in a line that stands for all that share a reason


def open_job(path: Path, given: Mapping[str, Any]) -> Job:
    """Load and prepare a float model as the options say that `calibrate` and `quantize` share."""
    from ..workflow import Job

    names = {"convert": "upgrade", "inline": "inline", "allow_hardlinks": "allow_hardlinks"}
    return Job.open(path, **{name: given[option] for name, option in names.items()})


def read_statistics(path: Path, job: Job, *, by_name: bool = False) -> Calibration:
    """Read a ``.qcal`` file and hold it against the model.

    Args:
        path: The file.
        job: The model that it is to serve.
        by_name: Accept statistics of another model, matched by tensor names.

    Raises:
        DataError: Damaged, or of another model.
    """
    from ..calibration import identify, load

    calibration = load(path)
    if not by_name and calibration.model.hash != job.hash:
        calibration.check_model(identify(job.path), where=str(path))
    return calibration


def collect_statistics(
    job: Job, given: Mapping[str, Any], tensors: Sequence[str], checkpoints: Checkpoints | None = None
) -> Calibration:
    """Collect of ``tensors`` from the data that the options name, with progress on stderr."""
    from ..data import inputs_of
    from ..memory import peak_memory
    from ..stages.collect import CollectOptions

    feed = feed_from(given, inputs_of(job.model.graph))
    with output.progress("calibrating", feed.expected, quiet=given["quiet"]) as advance:
        options = CollectOptions(
            **({"sentinel": given["sentinel"]} if given.get("sentinel") else {}),
            device=given["device"],
            workers=given.get("workers", 1),
            cluster=given.get("cluster"),
            allow_nonfinite=given.get("allow_nonfinite", False),
            max_memory=given.get("max_memory"),
            op_libraries=given["custom_op_library"],
            random=not given["data"],
            checkpoints=checkpoints,
            progress=lambda done, rate: advance(done, f"{rate:.1f} samples/s, peak {peak_memory() / 1e6:.0f} MB"),
            warn=output.warn,
        )
        start = time.monotonic()
        calibration = job.collect(feed, options, detail=given["detail"], tensors=tensors)
    seconds = max(time.monotonic() - start, 1e-9)
    output.note(
        f"{calibration.samples} samples, {len(calibration.tensors)} tensors, "
        f"{calibration.samples / seconds:.1f} samples/s, peak {peak_memory() / 1e6:.0f} MB"
    )
    for line in not_covered_lines(calibration.not_covered):
        output.note(line)
    return calibration


def not_covered_lines(not_covered: Mapping[str, str]) -> list[str]:
    """Return one line per reason, with the first of its tensors."""
    by_reason: dict[str, list[str]] = {}
    for tensor, reason in not_covered.items():
        by_reason.setdefault(reason, []).append(tensor)
    lines = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        lines.append(f"not covered: {', '.join(names[:_NAMED])}{more}: {reason}")
    return lines


def has_data(given: Mapping[str, Any]) -> bool:
    """Whether the options name data."""
    return bool(given["data"] or given["random_samples"])


def layer_data(job: Job, recipe: Recipe, given: Mapping[str, Any]) -> Data | None:
    """Return the data on which layers are quantized one after the other, read once; None where none is needed."""
    from ..data import inputs_of
    from ..stages.quantize import runs_layers
    from ..stages.sequential import Data

    if not has_data(given) or not runs_layers(recipe):
        return None
    batches = list(feed_from(given, inputs_of(job.model.graph)))
    return Data(batches=batches, device=given["device"], op_libraries=given["custom_op_library"])


@contextmanager
def shown(data: Data | None, given: Mapping[str, Any]) -> Iterator[Data | None]:
    """Give the same data, with progress on stderr while layers are quantized."""
    if data is None:
        yield None
        return
    with output.progress("quantizing layer by layer", None, quiet=given["quiet"]) as advance:
        yield replace(data, progress=lambda done, total: advance(done, f"of {total} layers"))
