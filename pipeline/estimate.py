"""What quantizing a model will take: bytes written, memory and time, before any of it is done.

Sizes follow from the plan. Times are so many bytes or elements times a rate, and the rates are measured here, in a
fraction of a second: reading a little of the model's own file, writing a little beside the target, and quantizing a
small array as the plan says. What is cached, or busy, at that moment shows in the result; it is an estimate.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from ..calibrate.formats import FORMATS
from ..calibrate.qarray import Spec, params_from_scale, quantize
from ..calibrate.stats.channel_amax import ChannelAmax
from ..calibrate.stats.gram import Gram
from ..calibrate.weights import WEIGHT_METHODS, WeightStats
from .constants import Weight, weight_of
from .extents import extremes
from .graph import Model, all_graphs, constants, stored_size
from .graph.constants import FileValues
from .graph.external import CHUNK
from .graph.halves import widened
from .graph.lazy import REGION
from .graph.parallel import cores, in_order
from .layouts import Layout, layout_of
from .memory import peak_memory
from .plan import Decision, Plan
from .streaming import ROUNDING

_SAMPLE_BYTES = 2**25
_TRIAL_SHARE = 16
"""A trial is at most such a part of the work: no more than a waste of a few percent."""
_SAMPLE = (64, 1024)
"""Outputs and inputs of the array that is quantized on trial."""

_IN_FLIGHT = 2 * cores() * (16 * REGION + CHUNK) + 2**26
"""Bytes of the regions under work, and freed ones that the C library keeps."""

_PASSES = 2
"""Times that weights are still read: for their extremes, and for their codes."""
_PER_NODE = 1e-3
"""Seconds that a node takes on its way through the stages, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a quantization takes, estimated or measured.

    Attributes:
        output_bytes: Bytes of all files written.
        peak_bytes: Largest resident memory of the process.
        seconds: From the start of the command to the end; collecting statistics is not counted.
    """

    output_bytes: int
    peak_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the cost as JSON data."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One weight to quantize."""

    weight: Weight
    decision: Decision
    spec: Spec
    layout: Layout

    @property
    def elements(self) -> int:
        return math.prod(self.weight.shape)

    @property
    def algorithm(self) -> str:
        """What quantizes it; the form of outlier columns names none, and rounds."""
        return self.decision.algorithm or "rtn"

    @property
    def needs_statistics(self) -> bool:
        return bool(WEIGHT_METHODS.resolve(self.algorithm).needs)

    @property
    def inputs(self) -> int:
        return self.elements // max(1, self.weight.shape[self.layout.order[0]])

    @property
    def parameter_bytes(self) -> int:
        """Bytes of scales, and of zero points where they are stored."""
        fmt, count = self.spec.format, math.prod(self.spec.granularity.scale_shape(self.weight.shape))
        has_zero = self.decision.form == "qdq" or not self.spec.symmetric
        return count * FORMATS.get(fmt.scale_format).bits // 8 + (-(-count * fmt.bits // 8) if has_zero else 0)

    @property
    def code_bytes(self) -> int:
        return -(-self.elements * self.spec.format.bits // 8)


def estimate(model: Model, plan: Plan, folder: Path, spent: float) -> Cost:
    """Estimate what carrying out a plan and saving the result takes.

    Args:
        model: The prepared float model; only a little of its weights is read.
        plan: What was decided.
        folder: Where the result goes.
        spent: Seconds since the command began, in which the model was loaded, hashed and prepared.
    """
    tasks = list(_tasks(model, plan))
    held = {id(c): c for graph in all_graphs(model.graph) for c in constants(graph)}
    total = sum(stored_size(constant) for constant in held.values())
    replaced = {id(task.weight.constant): stored_size(task.weight.constant) for task in tasks}
    stored_bytes = sum(task.code_bytes + task.parameter_bytes for task in tasks)
    nodes = sum(len(graph.nodes) for graph in all_graphs(model.graph))
    output = total - sum(replaced.values()) + stored_bytes + 200 * nodes
    reading = _PASSES * total / _read_rate(list(held.values()))
    writing = output / _write_rate(folder, output)
    computing = sum(_seconds(task) for task in tasks)
    return Cost(
        output_bytes=output,
        peak_bytes=_resident() + _working_bytes(tasks) + (_IN_FLIGHT if total > CHUNK else 0),
        seconds=spent + reading + computing + writing + _PER_NODE * nodes,
    )


def measured(files: list[Path], seconds: float) -> Cost:
    """Return what a run that has ended took.

    Args:
        files: What it wrote.
        seconds: Since the command began, less what was spent on collecting statistics.
    """
    written = sum(path.stat().st_size for path in files)
    return Cost(output_bytes=written, peak_bytes=peak_memory(), seconds=seconds)


def _tasks(model: Model, plan: Plan) -> Iterator[_Task]:
    nodes = {node.name: node for graph in all_graphs(model.graph) for node in graph.nodes}
    seen = set()
    for decision in plan.quantized():
        if decision.site.role != "weight" or decision.spec is None:
            continue
        node = nodes[decision.site.node]
        weight = weight_of(node.inputs[decision.site.index])
        if weight is not None and (weight.key, decision.spec) not in seen:
            seen.add((weight.key, decision.spec))
            yield _Task(weight=weight, decision=decision, spec=decision.spec, layout=layout_of(node, weight.shape))


def _working_bytes(tasks: list[_Task]) -> int:
    """Return what is held beside the regions under work: scales while they are checked, and whole layers."""
    parameters = sum(task.parameter_bytes for task in tasks)
    largest = 0
    for task in tasks:
        width = 1 if _rounds(task) else 24 if task.needs_statistics else 12
        if _rounds(task) and task.decision.form == "qdq":
            width = 0
        gram = 24 * task.inputs**2 if task.needs_statistics else 0
        largest = max(largest, width * task.elements + gram)
    return parameters + largest


def _rounds(task: _Task) -> bool:
    """Whether the codes follow from the scales, and so are made region by region."""
    rounds = task.algorithm.partition(":")[0] in ROUNDING and not task.spec.pair_limit
    return rounds and task.decision.form != "outlier"


def _seconds(task: _Task) -> float:
    """Return how long quantizing a weight takes, by a trial on a small one."""
    name, spec = task.algorithm, task.layout.spec(task.spec)
    find, make = _trial(name, spec, task.decision.form)
    growth = max(1.0, task.inputs / _SAMPLE[1]) if task.needs_statistics else 1.0
    return task.elements * (find * growth + make) / cores()


_TRIALS: dict[tuple[str, Spec, str], tuple[float, float]] = {}


def _trial(name: str, spec: Spec, form: str) -> tuple[float, float]:
    """Return seconds per element on one core to find scales, and to make the codes from them."""
    key = (name, spec, form)
    if key not in _TRIALS:
        rng = np.random.default_rng(0)
        half = rng.normal(size=_SAMPLE).astype(np.float16)
        wide, count = widened(half), half.size
        params = params_from_scale(np.full(spec.granularity.scale_shape(wide.shape), 0.1), spec)
        make = _timed(lambda: quantize(widened(half), params)) / count
        if name == "rtn" and not spec.pair_limit:
            find = _timed(lambda: extremes(half, spec.granularity)) / count
        else:
            method = WEIGHT_METHODS.resolve(name)
            x = rng.normal(size=(256, _SAMPLE[1])).astype(np.float32)
            stats = WeightStats(gram=Gram.of(x), channels=ChannelAmax.of(x)) if method.needs else None
            find = _timed(lambda: method(wide, spec, stats), 1) / count
        _TRIALS[key] = find, make
    return _TRIALS[key]


def _timed(action: Callable[[], object], repeats: int = 3) -> float:
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - start)
    return best


def _read_rate(held: list[gs.Constant]) -> float:
    """Return bytes per second at which weights are read, infinite where they are in memory."""
    outside = [c._values for c in held if isinstance(c._values, FileValues)]
    if not outside:
        return math.inf
    largest = max(outside, key=lambda values: values.nbytes)
    size = min(_SAMPLE_BYTES, largest.nbytes)
    start = time.perf_counter()
    for _ in in_order(job for job, _ in zip(largest.jobs(), range(-(-size // CHUNK)), strict=False)):
        pass
    return size / max(time.perf_counter() - start, 1e-9)


def _write_rate(folder: Path, size: int) -> float:
    """Return bytes per second at which a file is written and flushed."""
    sample = min(_SAMPLE_BYTES, size // _TRIAL_SHARE)
    data = bytes(min(sample, 2**20) + 1)
    count = max(1, sample // len(data))
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            for _ in range(count):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return count * len(data) / max(time.perf_counter() - start, 1e-9)
    except OSError:
        return math.inf  # saving will say what is wrong with the folder


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
