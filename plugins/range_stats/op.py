"""``qpipe.RangeStatsHost``: an operator that counts an activation inside the graph, where it lies.

    counted = RangeStatsHost (x)        attributes: key, channels (0 or 1), sentinel (1e30), threads (the machine's)

The counters stay in the library, under the key, from run to run: no activation and no histogram leaves the session.
What they hold is, bit for bit, what ``calibrate.stats.HistogramObserver`` and ``ChannelAmax`` hold after the same
runs; that is the numpy reference (but for the sums of a tensor with one channel, which numpy adds pairwise).
``counted`` (int64 []) is the number of values, a graph output only so that the node is not removed; nobody has to
fetch it. Runs of several threads may overlap; each thread takes the sums of its own (`take_channels`), the rest is
read between runs.

On CUDA the counters travel as a tensor instead (``RangeStats``, kernel.cu).
"""

from __future__ import annotations

import ctypes
import functools
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from ...calibrate.errors import UnsupportedError
from ...calibrate.stats.channel_amax import ChannelAmax
from ...calibrate.stats.extrema import SENTINEL, Extrema
from ...calibrate.stats.histogram import BINS, Histogram
from .. import library
from .placing import add_behind

DOMAIN = "qpipe"
OP_TYPE = "RangeStatsHost"
VERSION = 1
OUTPUT_SUFFIX = "_range_stats"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """A model that counts.

    Attributes:
        proto: The model with one counting node per tensor; run it with the plugin registered.
        keys: Key of each tensor's counters, by tensor name. They live until `release`.
    """

    proto: onnx.ModelProto
    keys: Mapping[str, int]


def attach(
    proto: onnx.ModelProto,
    tensors: Iterable[str],
    *,
    channels: Iterable[str] = (),
    sentinel: float = SENTINEL,
    threads: int | None = None,
) -> Attached:
    """Add a counting node behind each tensor of the main graph.

    Args:
        proto: The model; changed in place (a copy would double its weights).
        tensors: float32, float16 or bfloat16 tensors of the main graph.
        channels: Those of them whose magnitudes per channel (last axis) are wanted as well.
        sentinel: Magnitude from which finite values are masks.
        threads: How many threads share a tensor at most, None for those of the machine; the session may have fewer.

    Raises:
        UnsupportedError: A tensor is not one of the main graph.
    """
    graph = proto.graph
    known = {entry.name for entry in graph.input} | {name for node in graph.node for name in node.output}
    with_channels = set(channels)
    keys: dict[str, int] = {}
    nodes = []
    for tensor in dict.fromkeys(tensors):
        if tensor not in known:
            raise UnsupportedError("only tensors of the main graph can be counted inside it", where=tensor)
        keys[tensor] = secrets.randbits(62)
        counted = tensor + OUTPUT_SUFFIX
        attributes = {"key": keys[tensor], "channels": int(tensor in with_channels), "sentinel": float(sentinel)}
        attributes |= {} if threads is None else {"threads": threads}
        nodes.append(helper.make_node(OP_TYPE, [tensor], [counted], name=counted, domain=DOMAIN, **attributes))
        graph.output.append(helper.make_tensor_value_info(counted, TensorProto.INT64, []))
    add_behind(graph, nodes)
    if keys and DOMAIN not in {entry.domain for entry in proto.opset_import}:
        proto.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    return Attached(proto=proto, keys=keys)


def read(key: int, *, clear: bool = False) -> tuple[Histogram, ChannelAmax | None]:
    """Return what was counted under a key so far.

    Args:
        key: From `attach`.
        clear: Start again from nothing.

    Raises:
        PluginError: The library does not load.
        KeyError: No session was opened with the key.
    """
    ids, counts = np.empty(BINS, np.uint16), np.empty(BINS, np.int64)
    facts = np.zeros(6, np.int64)
    span = np.zeros(2, np.float32)
    lib = _functions()
    size = lib.qpipe_range_stats_histogram(key, *(_pointer(array) for array in (ids, counts, facts, span)))
    if size < 0:
        raise KeyError(key)
    finite, nan, pos_inf, neg_inf, sentinel, low_bits = (int(value) for value in facts)
    extrema = Extrema(
        finite=finite,
        # Adding 0 turns -0 into 0.
        lo=float(span[0]) + 0.0 if finite else 0.0,
        hi=float(span[1]) + 0.0 if finite else 0.0,
        nan=nan,
        pos_inf=pos_inf,
        neg_inf=neg_inf,
        sentinel=sentinel,
    )
    channels = _copied(lib.qpipe_range_stats_channels, key)
    if clear:
        lib.qpipe_range_stats_clear(key)
    return Histogram(ids=ids[:size].copy(), counts=counts[:size].copy(), low_bits=low_bits, extrema=extrema), channels


def release(keys: Iterable[int]) -> None:
    """Free the counters of these keys."""
    lib = _functions()
    for key in keys:
        lib.qpipe_range_stats_release(key)


def take_channels(key: int) -> ChannelAmax | None:
    """Return the magnitudes per channel that runs of this thread summed, None when there are none, and clear them."""
    return _copied(_functions().qpipe_range_stats_take_channels, key)


def _copied(copy: Callable[..., int], key: int) -> ChannelAmax | None:
    count = copy(key, -1, None, None, None, None)
    if not count:
        return None
    amax, total, energy = np.zeros(count, np.float32), np.zeros(count), np.zeros(count)
    tokens = np.zeros(1, np.int64)
    pointers = (_pointer(array) for array in (amax, total, energy, tokens))
    copy(key, count, *pointers)
    return ChannelAmax(amax=amax, total=total, energy=energy, tokens=int(tokens[0]))


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@functools.cache
def _functions() -> ctypes.CDLL:
    lib = library()
    key, pointer = ctypes.c_int64, ctypes.c_void_p
    lib.qpipe_range_stats_histogram.argtypes = [key, pointer, pointer, pointer, pointer]
    lib.qpipe_range_stats_histogram.restype = ctypes.c_int64
    for copy in (lib.qpipe_range_stats_channels, lib.qpipe_range_stats_take_channels):
        copy.argtypes = [key, ctypes.c_int64, pointer, pointer, pointer, pointer]
        copy.restype = ctypes.c_int64
    lib.qpipe_range_stats_clear.argtypes = [key]
    lib.qpipe_range_stats_clear.restype = None
    lib.qpipe_range_stats_release.argtypes = [key]
    lib.qpipe_range_stats_release.restype = None
    return lib
