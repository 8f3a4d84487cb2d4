"""Collect: run the model over data once and keep statistics of its activations, nothing else.

One pass, in memory that does not grow with the data: an activation lives until its batch has been counted. The
statistics can be saved on the way, so that a run that is stopped or killed goes on where it was, and they merge
exactly, so that several processes find what one would have found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from ...calibrate.errors import DataError
from ...calibrate.stats.extrema import HALF_SENTINEL, MAX_NONFINITE, SENTINEL
from ..calibration import Calibration, ModelIdentity, identify
from ..calibration.checkpoints import Checkpoints, Saver
from ..calibration.cluster import cluster_for_joblib
from ..calibration.job import Job
from ..calibration.lanes import Hold, lanes_for
from ..calibration.masks import masked_tensors
from ..calibration.observe import Detail, Stats
from ..calibration.parallel import observe_in_parallel
from ..calibration.probe import Batch
from ..calibration.runner import Runner
from ..data.feed import Fingerprint, cut, is_empty, samples_in
from ..data.signature import to_array
from ..environment import installed
from ..graph import Model, all_graphs, constants, from_proto, load, save, stored_size
from ..graph.constants import FileValues
from ..interrupts import Interrupted, StopRequest
from ..session import load_onnxruntime
from .floats import float32_twin, without_bfloat16
from .lower import runnable

_LARGE = 2**28
"""Bytes of weights that lie in no file from which they are written to one: a runtime would be handed several copies."""

_GROUP = 4  # batches per task of a worker


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectOptions:
    """How to collect.

    Attributes:
        details: What to collect of a tensor beside its histogram, by tensor.
        sentinel: Magnitude from which finite values are masks: counted apart, never in a range.
        allow_nonfinite: Accept any number of NaN and infinities.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        threads: Threads per process, None for ONNX Runtime's choice. Several batches share them side by side.
        workers: Processes; more than 1 needs joblib. On a cluster the model must be a path that all machines read.
        cluster: ``"dask:ADDRESS"``, ``"ray"`` or ``"ray:ADDRESS"``; None for this machine, or for what the caller has
            chosen with ``joblib.parallel_config``.
        native: Count inside the graph where the plugin library is built; the result is the same without.
        op_libraries: Libraries of custom operators that the model needs.
        max_memory: Refuse a model that makes a tensor of more bytes; None for the machine's memory.
        batch_bytes: Bytes of activations held at a time, by all batches under way together. Batches that alone would
            hand out over a quarter of it are split, where the model's batch axis is free.
        random: Remember in the statistics that the data means nothing.
        checkpoints: None for nothing saved.
        identity: The model that the statistics are for, where that is not the one that runs.
        progress: Told the number of samples and the samples per second as the run goes.
        warn: Told what is odd about the data or the run.
    """

    details: Mapping[str, Detail] = field(default_factory=dict)
    sentinel: float = SENTINEL
    allow_nonfinite: bool = False
    device: str = "cpu"
    threads: int | None = None
    workers: int = 1
    cluster: str | None = None
    native: bool = True
    op_libraries: tuple[Path, ...] = ()
    max_memory: int | None = None
    batch_bytes: int = 2**31
    random: bool = False
    checkpoints: Checkpoints | None = None
    identity: ModelIdentity | None = None
    progress: Callable[[int, float], None] | None = None
    warn: Callable[[str], None] | None = None


def collect(
    model: Model | onnx.ModelProto | str | Path,
    tensors: Sequence[str],
    batches: Iterable[Batch],
    options: CollectOptions = CollectOptions(),
) -> Calibration:
    """Run ``model`` over ``batches`` and return the statistics of ``tensors``.

    Args:
        model: The model, or its path.
        tensors: Names of activations: graph inputs, results of nodes, also inside bodies of If, Loop and Scan. Those
            that cannot be had are listed in the result with the reason.
        batches: Array by input name; sizes may differ from batch to batch. Consumed once.
        options: How.

    Raises:
        DataError: A batch does not fit, there is none, or activations are not finite.
        Interrupted: Ctrl-C or SIGTERM, after saving.
        ModelError: The model fails, or would take too much memory.
        WriteError: The target of the checkpoints exists, or cannot be written.
        QpipeError: As `make_session`.
    """
    # Absolute: a worker of a cluster has a current folder of its own.
    path = str(Path(model).absolute()) if isinstance(model, (str, Path)) else ""
    if isinstance(model, (str, Path)):
        model = load(model)
    elif isinstance(model, onnx.ModelProto):
        model = from_proto(model)
    identity, twin = options.identity or identify(model), float32_twin(runnable(model))
    # Copies: whoever gives the data may use an array again while a batch waits for its turn.
    batches = ({name: to_array(value).copy() for name, value in batch.items()} for batch in batches)
    if twin is not model:
        model, path, batches = twin, "", map(without_bfloat16, batches)
    job = Job(
        tensors=tuple(tensors),
        details=options.details,
        sentinel=options.sentinel,
        allow_nonfinite=options.allow_nonfinite,
        device=options.device,
        threads=options.threads,
        native=options.native,
        op_libraries=options.op_libraries,
        **({} if options.max_memory is None else {"tensor_bytes": options.max_memory}),
        batch_bytes=options.batch_bytes,
    )
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        alone = options.workers == 1 and options.cluster is None
        if _in_memory(model) > _LARGE if alone else not path:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qpipe-model-"))
            path = str(save(model, Path(folder) / "model.onnx", external_threshold=0)[-1])
            model = load(path)
        stream = iter(batches)
        ahead = list(itertools.islice(stream, 2)) if alone else []
        if len(ahead) > 1:  # a single batch has all threads to itself
            job = dataclasses.replace(job, lanes=lanes_for(options.threads))
        stream = itertools.chain(ahead, stream)
        run = _Run(model, Runner(model, job), options, identity)
        if alone:
            return run.over(stream, run.in_lanes, stop)
        stack.enter_context(cluster_for_joblib(options.cluster))
        return run.over(stream, lambda stream, _: run.in_parallel(stream, path, job), stop)


def _in_memory(model: Model) -> int:
    """Return the bytes of a model's weights that lie in no file from which a runtime could map them."""
    held = {id(c): c for graph in all_graphs(model.graph) for c in constants(graph)}
    return sum(stored_size(c) for c in held.values() if not isinstance(c._values, FileValues))


@dataclass(slots=True)
class _Progress:
    """How far the data has been read: fingerprint of the samples, and batches that had no elements."""

    seen: dict[str, Any] = field(default_factory=lambda: Fingerprint().state())
    skipped: int = 0


_Steps = Generator[tuple[_Progress, bool], None, None]


class _Run:
    def __init__(self, model: Model, runner: Runner, options: CollectOptions, identity: ModelIdentity) -> None:
        self._model = model
        self._runner = runner
        self._options = options
        self._identity = identity
        self._observers = runner.observers()
        self._done = _Progress()
        self._read = Fingerprint()
        self._skipped = 0

    def over(
        self,
        batches: Iterable[Batch],
        observe: Callable[[Iterator[Batch], Hold], _Steps],
        stop: StopRequest,
    ) -> Calibration:
        """Observe all batches, saving on the way, until the data ends or ``stop`` is requested.

        ``observe`` yields how far it is, and whether nothing beyond has been counted: only then can be saved. It is
        told, by a number of steps under way, whether it is to get there.
        """
        saver = Saver(self._options.checkpoints, self._result)
        stream = self._filled(batches)
        if (earlier := saver.earlier()) is not None:
            stream = self._go_on(earlier, stream)
        start, before = time.monotonic(), self._samples
        steps = observe(stream, lambda ahead: bool(stop.signum) or saver.due(ahead))
        with contextlib.closing(steps):
            for self._done, is_all in steps:
                if self._options.progress is not None:
                    rate = (self._samples - before) / max(time.monotonic() - start, 1e-9)
                    self._options.progress(self._samples, rate)
                if stop.signum and is_all:
                    saver.save()
                    raise Interrupted(f"stopped after {self._samples} samples", stop.signum)
                saver.tick(is_all)
        self._done.skipped = self._skipped
        if not self._samples:
            raise _no_samples(self._skipped)
        result = self._result()
        judge(result.tensors, self._options, self._model)
        saver.save()
        return result

    def in_lanes(self, stream: Iterator[Batch], hold: Hold) -> _Steps:
        """Observe in this process."""
        sent: deque[_Progress] = deque()

        def taken() -> Iterator[Batch]:
            for batch in stream:
                sent.append(self._count([batch]))
                yield batch

        for is_all in self._runner.observe(taken(), self._observers, hold):
            yield sent.popleft(), is_all

    def in_parallel(self, stream: Iterator[Batch], path: str, job: Job) -> _Steps:
        """Observe in other processes, and add up what they find in the order of the data."""
        sent: deque[_Progress] = deque()

        def groups() -> Iterator[list[Batch]]:
            while group := list(itertools.islice(stream, _GROUP)):
                sent.append(self._count(group))
                yield group

        for results in observe_in_parallel(path, job, self._options.workers, groups(), self._options.warn):
            for stats in results:
                self._observers.add(stats)
            yield sent.popleft(), True

    @property
    def _samples(self) -> int:
        return int(self._done.seen["samples"])

    def _count(self, group: list[Batch]) -> _Progress:
        for batch in group:
            self._read.update(batch)
        return _Progress(self._read.state(), self._skipped)

    def _filled(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if is_empty(batch):
                self._skipped += 1
            else:
                yield batch

    def _go_on(self, earlier: Calibration, stream: Iterator[Batch]) -> Iterator[Batch]:
        """Take over what was collected earlier; return the rest of the data."""
        earlier.check_model(self._identity, where="--resume")
        fresh = self._result()
        if list(earlier.tensors) != list(fresh.tensors) or dict(earlier.options) != dict(fresh.options):
            raise DataError(
                "the file to resume was collected with other tensors or options",
                do="use the same options again, or start anew without --resume",
            )
        wanted = earlier.data[0]["samples"] if len(earlier.data) == 1 else -1
        rest: list[Batch] = []
        while self._read.samples < wanted and (batch := next(stream, None)) is not None:
            left = wanted - self._read.samples
            if samples_in(batch) > left:
                rest = [cut(batch, left, samples_in(batch))]
                batch = cut(batch, 0, left)
            self._count([batch])
        if self._read.state() != earlier.data[0] or wanted < 0:
            raise DataError(
                "the data is not the data of the run to resume",
                found=f"other content in the first {self._read.samples} samples",
                expected=f"the {wanted} samples that were seen before, then the rest",
                do="give the same data in the same order, or start anew without --resume",
            )
        self._observers.add(earlier.tensors)
        self._done = _Progress(self._read.state(), self._skipped)
        return itertools.chain(rest, stream)

    def _result(self) -> Calibration:
        self._runner.settle(self._observers)
        return Calibration(
            tensors=self._observers.result(),
            samples=self._samples,
            skipped=self._done.skipped,
            model=self._identity,
            data=(self._done.seen,),
            options={
                "sentinel": self._options.sentinel,
                "device": self._options.device,
                **({"random": True} if self._options.random else {}),
            },
            versions={"onnxruntime": load_onnxruntime().__version__, "qpipe": installed("qpipe") or ""},
            not_covered=self._runner.not_covered,
        )


def judge(tensors: Stats, options: CollectOptions, model: Model) -> None:
    """Warn of what does not take part in ranges, and refuse data that is mostly not finite.

    -Inf that the model itself brings along, as masks of attention do, is no fault of the data.

    Raises:
        DataError: More than `MAX_NONFINITE` of a tensor is NaN or infinite, unless that is allowed.
    """
    found = {name: stats.histogram for name, stats in tensors.items()}
    broken = [name for name, h in found.items() if h.nonfinite]
    masked = [name for name, h in found.items() if h.sentinel]
    bad = [name for name in broken if found[name].nonfinite > MAX_NONFINITE * found[name].total]
    if bad:
        infinite, replaced = masked_tensors(model.graph)
        bad = [n for n in bad if n not in infinite or found[n].nonfinite > found[n].extrema.neg_inf]
        bad = [n for n in bad if n not in replaced or found[n].nonfinite > found[n].extrema.nan]
    if bad and not options.allow_nonfinite:
        raise DataError(
            f"tensor {bad[0]!r} is not finite",
            found=f"{_counts(found[bad[0]].extrema)}; first of {len(bad)} tensors in the order of the model",
            expected=f"at most {MAX_NONFINITE:.1%} NaN and infinities",
            do="fix the data or the model, or pass --allow-nonfinite",
        )
    if options.warn is not None and broken:
        options.warn(
            f"{len(broken)} tensors have NaN or infinities, the first is {broken[0]!r}: "
            f"{_counts(found[broken[0]].extrema)}; they are left out"
        )
    if options.warn is not None and masked:
        options.warn(
            f"{len(masked)} tensors have mask values ({options.sentinel:g} or more, {HALF_SENTINEL:g} in float16), "
            f"the first is {masked[0]!r}; they are left out"
        )


def _counts(extrema: Any) -> str:
    return f"{extrema.nan} NaN, {extrema.pos_inf} +Inf, {extrema.neg_inf} -Inf of {extrema.total} values"


def _no_samples(skipped: int) -> DataError:
    return DataError(
        "the data gave no samples",
        found=f"{skipped} batches without elements" if skipped else "no batch at all",
        do="a generator that was iterated before is empty the second time: pass a fresh one",
    )
