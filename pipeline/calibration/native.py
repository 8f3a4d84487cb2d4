"""Counting inside the graph by the plugin's operator, where the library is built; numpy finds the same bits without."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence

import onnx

from ... import plugins
from ...calibrate.errors import PluginError
from .limits import Known
from .observe import Detail, Stats
from .record import TensorStats

_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


class Counters:
    """Counters of tensors in the plugin library; they live as long as this object.

    Args:
        proto: The model; counting nodes are added to it.
        tensors: What to count, of those that `countable` gave.
        details: What to collect beside histograms.
        sentinel: Magnitude from which finite values are masks.
    """

    def __init__(
        self, proto: onnx.ModelProto, tensors: Sequence[str], details: Mapping[str, Detail], sentinel: float
    ) -> None:
        from ...plugins.range_stats.op import attach, release

        with_channels = [name for name in tensors if name in details]
        self._keys = attach(proto, tensors, channels=with_channels, sentinel=sentinel).keys
        weakref.finalize(self, release, list(self._keys.values()))

    def take(self, tensors: Collection[str]) -> Stats:
        """Return what was counted of ``tensors`` since it was last taken."""
        from ...plugins.range_stats.op import read

        found = {}
        for name in tensors:
            if name in self._keys:
                histogram, channels = read(self._keys[name], clear=True)
                found[name] = TensorStats(histogram=histogram, channels=channels)
        return found


def usable(device: str) -> bool:
    """Whether the plugin counts on this device."""
    if device != "cpu" or not plugins.is_built():
        return False
    try:
        plugins.library()
    except PluginError:
        return False
    return True


def countable(
    proto: onnx.ModelProto, tensors: Sequence[str], details: Mapping[str, Detail], known: Mapping[str, Known]
) -> list[str]:
    """Return those of ``tensors`` that the operator counts: 16 or 32-bit floats of the main graph."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    main = {entry.name for entry in proto.graph.input} | {name for node in proto.graph.node for name in node.output}
    simple = [name for name in dict.fromkeys(tensors) if name not in details or details[name] == Detail()]
    return [name for name in simple if name in main - constants and name in known and known[name].onnx_type in _TYPES]
