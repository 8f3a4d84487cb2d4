"""Counting inside the graph by the plugin's operators, where the library is built; numpy finds the same bits without.

On the CPU the counters live in the library. On CUDA they are tensors that stay on the device, so that neither they nor
the activations that they count are copied to the host from batch to batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import onnx

from ... import plugins
from ...calibrate.errors import PluginError
from ...calibrate.stats.histogram import Histogram
from ..data import Batch
from .job import Job
from .limits import Known
from .observe import Detail, Stats
from .record import TensorStats

if TYPE_CHECKING:
    import onnxruntime

    from ...plugins.range_stats.device import DeviceCounters

_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


class Counters:
    """Counters of tensors in the plugin library; they live as long as this object.

    Args:
        proto: The model; counting nodes are added to it.
        details: What to collect beside histograms.
        sentinels: What to count, of those that `countable` gave, and the magnitude from which values are masks.
        threads: Threads of the session, None for those of the machine.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        details: Mapping[str, Detail],
        sentinels: Mapping[str, float],
        threads: int | None,
    ) -> None:
        from ...plugins.range_stats.op import attach, release

        self._keys: dict[str, int] = {}
        for sentinel, alike in _by_sentinel(sentinels):
            with_channels = [name for name in alike if name in details]
            self._keys |= attach(proto, alike, channels=with_channels, sentinel=sentinel, threads=threads).keys
        self._with_channels = [name for name in sentinels if name in details]
        weakref.finalize(self, release, list(self._keys.values()))

    def run(self, session: onnxruntime.InferenceSession, names: Sequence[str], batch: Batch) -> list[Any]:
        """Run a batch and return the graph outputs ``names``."""
        return list(session.run(names, batch))

    def take(self, tensors: Collection[str]) -> Stats:
        """Return what was counted of ``tensors`` since it was last taken."""
        from ...plugins.range_stats.op import read

        found = {}
        for name in tensors:
            if name in self._keys:
                histogram, channels = read(self._keys[name], clear=True)
                found[name] = TensorStats(histogram=histogram, channels=channels)
        return found

    def take_sums(self) -> Stats:
        """Return the sums per channel of runs of this thread since they were last taken; the rest stays where it is."""
        from ...plugins.range_stats.op import take_channels

        sums = {name: take_channels(self._keys[name]) for name in self._with_channels}
        return {name: TensorStats(histogram=Histogram.empty(), channels=found) for name, found in sums.items()}


class CountersOnDevice:
    """Counters of tensors in the memory of a CUDA device.

    Args:
        proto: The model; counting nodes, and their states as inputs and outputs, are added to it.
        sentinels: What to count, of those that `countable` gave, and the magnitude from which values are masks.
        device: Where the session runs.
    """

    def __init__(self, proto: onnx.ModelProto, sentinels: Mapping[str, float], device: str = "cuda") -> None:
        from ...plugins.range_stats.device import attach

        groups = _by_sentinel(sentinels)
        self._tensors = [name for sentinel, alike in groups for name in attach(proto, alike, sentinel=sentinel)]
        self._device = device
        self._counters: DeviceCounters | None = None

    def run(self, session: onnxruntime.InferenceSession, names: Sequence[str], batch: Batch) -> list[npt.NDArray[Any]]:
        """Run a batch and return the graph outputs ``names``."""
        from ...plugins.range_stats.device import DeviceCounters

        if self._counters is None:
            self._counters = DeviceCounters(session, self._tensors, device=self._device)
        return self._counters.run(batch, names)

    def take(self, tensors: Collection[str]) -> Stats:
        """Return what was counted since it was last taken; nothing is copied when none of ``tensors`` is counted."""
        if self._counters is None or not set(tensors).intersection(self._tensors):
            return {}
        return {name: TensorStats(histogram=histogram) for name, histogram in self._counters.take().items()}

    def take_sums(self) -> Stats:
        """Return nothing: on a device only histograms are counted."""
        return {}


def counters_of(proto: onnx.ModelProto, job: Job, sentinels: Mapping[str, float]) -> Counters | CountersOnDevice | None:
    """Add counting nodes to a model for the tensors of ``sentinels``; None when there are none."""
    if not sentinels:
        return None
    if job.device == "cuda":
        return CountersOnDevice(proto, sentinels)
    return Counters(proto, job.details, sentinels, job.session_threads)


def _by_sentinel(sentinels: Mapping[str, float]) -> list[tuple[float, list[str]]]:
    groups: dict[float, list[str]] = {}
    for name, sentinel in sentinels.items():
        groups.setdefault(sentinel, []).append(name)
    return list(groups.items())


def usable(device: str) -> bool:
    """Whether the plugin counts on this device."""
    if device not in ("cpu", "cuda") or not plugins.is_built():
        return False
    try:
        facts = plugins.info()
    except PluginError:
        return False
    return device == "cpu" or facts["cuda"] is not None


def countable(proto: onnx.ModelProto, job: Job, known: Mapping[str, Known]) -> list[str]:
    """Return those of the job's tensors that the plugin counts: 16 or 32-bit floats of the main graph.

    On CUDA only those of which nothing but a histogram is wanted: the others have to come to the host anyway.
    """
    if not job.native or not usable(job.device):
        return []
    details: Mapping[str, Detail] = job.details
    constants = {tensor.name for tensor in proto.graph.initializer}
    main = {entry.name for entry in proto.graph.input} | {name for node in proto.graph.node for name in node.output}
    main -= constants
    on_host = job.device == "cpu"
    simple = [n for n in dict.fromkeys(job.tensors) if n not in details or (on_host and details[n] == Detail())]
    return [name for name in simple if name in main and name in known and known[name].onnx_type in _TYPES]
