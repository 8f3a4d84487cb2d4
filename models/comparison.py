"""The main job on a reference model, side by side with ONNX Runtime's own tools, in one process on the same data.

The demo prints the rows, benchmarks add configurations, tests hold the figures of qpipe.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..calibrate.metrics import cosine, sqnr_db
from ..pipeline.session import make_session
from ..pipeline.timing import race
from . import Batch, ReferenceModel, get

TIMED_BATCHES = 4
TIMED_ROUNDS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One configuration of one model.

    Attributes:
        model: Name of the reference model.
        config: Name of the configuration.
        megabytes: Size of the file.
        metrics: Metrics of the task, in exact semantics.
        deployed: The same with ONNX Runtime's default optimizations on this CPU.
        sqnr_db: Signal to noise of the outputs against float, exact and deployed.
        cosine: Cosine of all outputs against float, exact and deployed.
        speed: How many times faster than the float model, both as deployed, in the same run.
        error: Why the configuration gave no model, ``""`` when it did.
    """

    model: str
    config: str
    megabytes: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    deployed: Mapping[str, float] = field(default_factory=dict)
    sqnr_db: tuple[float, float] = (0.0, 0.0)
    cosine: tuple[float, float] = (0.0, 0.0)
    speed: float = 0.0
    error: str = ""


Maker = Callable[["Subject", Path], None]
"""Writes one configuration of a subject to a path."""


@dataclass(slots=True, kw_only=True)
class Subject:
    """A reference model on disk, with what all its configurations share.

    Attributes:
        name: Of the reference model; ``+outliers`` at its end plants outlier features.
        folder: Where all files go.
        reference: The model's functions.
    """

    name: str
    folder: Path
    reference: ReferenceModel
    _outputs: list[Batch] = field(default_factory=list)

    @classmethod
    def export(cls, name: str, folder: Path) -> Subject:
        """Export a reference model into ``folder`` unless it is there already."""
        from ..pipeline.exportable import Exportable
        from ..pipeline.stages.export import export

        bare, _, variant = name.partition("+")
        subject = cls(name=name, folder=folder, reference=get(bare))
        if not subject.float_path.exists():
            module = subject.reference.build(outliers=True) if variant else subject.reference.build()  # type: ignore[call-arg]
            source = Exportable(
                module=module,
                example=subject.reference.example(),
                dynamic=subject.reference.dynamic_shapes(),
                outputs=subject.reference.OUTPUTS,
            )
            export(source, subject.float_path)
        return subject

    @property
    def float_path(self) -> Path:
        """The float model."""
        return self.folder / f"{self.name}.onnx"

    def float_outputs(self) -> list[Batch]:
        """Return the float model's outputs on the evaluation data, computed once."""
        if not self._outputs:
            self._outputs = list(run(self.float_path, self.reference.evaluation_batches(), exact=True))
        return self._outputs


def run(path: Path, batches: Iterator[Batch], *, exact: bool) -> Iterator[Batch]:
    """Yield the outputs of a model, batch by batch."""
    session = make_session(path, exact=exact)
    names = [output.name for output in session.get_outputs()]
    wanted = {entry.name for entry in session.get_inputs()}
    for batch in batches:
        feed = {name: array for name, array in batch.items() if name in wanted}
        yield dict(zip(names, session.run(None, feed), strict=True))


def compare(subject: Subject, configs: Mapping[str, Maker]) -> list[Row]:
    """Make every configuration, evaluate it, and time all of them against float in turn.

    Args:
        subject: The model.
        configs: Name -> maker. The float model always comes first and need not be named.

    Returns:
        One row per configuration, float first; a maker that raises gives a row with its error.
    """
    paths: dict[str, Path] = {"float": subject.float_path}
    errors: dict[str, str] = {}
    for name, make in configs.items():
        path = subject.folder / f"{subject.name}.{name.replace(' ', '-')}.onnx"
        path.unlink(missing_ok=True)
        try:
            make(subject, path)
        except Exception as error:  # noqa: BLE001 - a peer's failure is a result, whatever it raises
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            paths[name] = path
    batches = list(itertools.islice(subject.reference.evaluation_batches(), TIMED_BATCHES))
    times = race(list(paths.values()), batches, rounds=TIMED_ROUNDS)
    rows = [_row(subject, name, t.path, t.ratio) for name, t in zip(paths, times, strict=True)]
    return rows + [Row(model=subject.name, config=name, error=text) for name, text in errors.items()]


def _row(subject: Subject, config: str, path: Path, speed: float) -> Row:
    reference = subject.float_outputs()
    exact = list(run(path, subject.reference.evaluation_batches(), exact=True))
    deployed = list(run(path, subject.reference.evaluation_batches(), exact=False))
    return Row(
        model=subject.name,
        config=config,
        megabytes=size_on_disk(path) / 1e6,
        metrics=subject.reference.score(exact, reference),
        deployed=subject.reference.score(deployed, reference),
        sqnr_db=(sqnr_db(_flat(reference), _flat(exact)), sqnr_db(_flat(reference), _flat(deployed))),
        cosine=(cosine(_flat(reference), _flat(exact)), cosine(_flat(reference), _flat(deployed))),
        speed=speed,
    )


def size_on_disk(path: Path) -> int:
    """Return the bytes of a model file and of its data file."""
    files = (path, path.with_name(f"{path.name}.data"))
    return sum(file.stat().st_size for file in files if file.exists())


def _flat(outputs: Sequence[Batch]) -> np.ndarray:
    return np.concatenate([array.ravel() for batch in outputs for array in batch.values()])


def ort_static(subject: Subject, path: Path) -> None:
    """ONNX Runtime's quantize_static with its defaults, on the same calibration data."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Feeds the batches in order."""

        def __init__(self) -> None:
            self._batches = iter(subject.reference.calibration_batches())

        def get_next(self) -> Batch | None:
            """Return the next batch, None at the end."""
            return next(self._batches, None)

    quantize_static(str(subject.float_path), str(path), Reader())


def ort_dynamic(subject: Subject, path: Path) -> None:
    """ONNX Runtime's quantize_dynamic with its defaults."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(subject.float_path), str(path))


def qpipe(**keys: Any) -> Maker:
    """Return a maker for a recipe of qpipe, e.g. ``qpipe(scheme="w8a8", method="mse")``."""

    def make(subject: Subject, path: Path) -> None:
        from ..pipeline.recipe import make_recipe
        from ..pipeline.workflow import quantize_file

        quantize_file(subject.float_path, path, make_recipe(**keys), subject.reference.calibration_batches())

    return make


PEERS: dict[str, Maker] = {"ORT quantize_static": ort_static, "ORT quantize_dynamic": ort_dynamic}
"""What every table shows beside qpipe."""
