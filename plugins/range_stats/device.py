"""``qpipe.RangeStats``: count an activation on the GPU; counters stay there and are copied to the host once.

    new_state = RangeStats (x, state)        attribute: sentinel (1e30)

``state`` and ``new_state`` are int64 [65544]: 65,536 counters by the upper 16 bits of the float32 value, then the OR of
the lower 16 bits, keys of the exact minimum and maximum (unsigned integers that order as the values do), the counts of
NaN, +Inf, -Inf and mask sentinels, and one unused word. The operator exists on CUDA only; it has to be run with the
states bound to device memory (`DeviceCounters`), else every run would copy half a megabyte per tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from ...calibrate.errors import UnsupportedError
from ...calibrate.stats.extrema import SENTINEL, Extrema
from ...calibrate.stats.histogram import BINS, Histogram
from .placing import add_behind

if TYPE_CHECKING:
    import onnxruntime

DOMAIN = "qpipe"
OP_TYPE = "RangeStats"
VERSION = 1
STATE_WORDS = BINS + 8
STATE_SUFFIX = "_range_state"
NEXT_SUFFIX = "_range_state_next"

_ALL_ONES = 0xFFFFFFFF
_SIGN = 0x80000000


def empty_state() -> npt.NDArray[np.int64]:
    """Return the state of no values, int64 [65544]."""
    state = np.zeros(STATE_WORDS, np.int64)
    state[BINS + 1] = _ALL_ONES
    return state


def histogram_of(state: npt.NDArray[np.int64]) -> Histogram:
    """Return the histogram that a state [65544] holds."""
    dense = state[:BINS]
    low_bits, lowest, highest, nan, pos_inf, neg_inf, sentinel = (int(word) for word in state[BINS : BINS + 7])
    finite = int(dense.sum())
    extrema = Extrema(
        finite=finite,
        lo=_value(lowest) if finite else 0.0,
        hi=_value(highest) if finite else 0.0,
        nan=nan,
        pos_inf=pos_inf,
        neg_inf=neg_inf,
        sentinel=sentinel,
    )
    return Histogram.from_dense(dense, low_bits, extrema)


def attach(proto: onnx.ModelProto, tensors: Iterable[str], *, sentinel: float = SENTINEL) -> list[str]:
    """Add a counting node behind each tensor of the main graph; its states become a graph input and output.

    Args:
        proto: The model; changed in place.
        tensors: float32, float16 or bfloat16 tensors of the main graph.
        sentinel: Magnitude from which finite values are masks.

    Returns:
        The tensors, each once, in the order given.

    Raises:
        UnsupportedError: A tensor is not one of the main graph.
    """
    graph = proto.graph
    known = {entry.name for entry in graph.input} | {name for node in graph.node for name in node.output}
    counted, nodes = list(dict.fromkeys(tensors)), []
    for tensor in counted:
        if tensor not in known:
            raise UnsupportedError("only tensors of the main graph can be counted inside it", where=tensor)
        before, after = tensor + STATE_SUFFIX, tensor + NEXT_SUFFIX
        node = helper.make_node(OP_TYPE, [tensor, before], [after], name=after, domain=DOMAIN, sentinel=float(sentinel))
        nodes.append(node)
        graph.input.append(helper.make_tensor_value_info(before, TensorProto.INT64, [STATE_WORDS]))
        graph.output.append(helper.make_tensor_value_info(after, TensorProto.INT64, [STATE_WORDS]))
    add_behind(graph, nodes)
    if counted and DOMAIN not in {entry.domain for entry in proto.opset_import}:
        proto.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    return counted


class DeviceCounters:
    """Runs a model with attached counters and keeps their states on the device.

    Args:
        session: Of the model that `attach` changed, on CUDA, with the plugin registered.
        tensors: What `attach` returned.
        device: Device type of ONNX Runtime.
        device_id: Number of the device.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, tensors: Iterable[str], *, device: str = "cuda", device_id: int = 0
    ) -> None:
        import onnxruntime

        self._session = session
        self._states = {
            tensor: onnxruntime.OrtValue.ortvalue_from_numpy(empty_state(), device, device_id) for tensor in tensors
        }

    def run(self, batch: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str] = ()) -> list[npt.NDArray[Any]]:
        """Count one batch, array by input name, and return ``outputs`` of the graph."""
        binding = self._session.io_binding()
        for name, array in batch.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in outputs:
            binding.bind_output(name)
        for tensor, state in self._states.items():
            # The same memory going in and coming out: the kernel then adds in place.
            binding.bind_ortvalue_input(tensor + STATE_SUFFIX, state)
            binding.bind_ortvalue_output(tensor + NEXT_SUFFIX, state)
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return [value.numpy() for value in binding.get_outputs()[: len(outputs)]]

    def take(self) -> dict[str, Histogram]:
        """Return what was counted since the last time, and begin anew; the only copy of counters to the host."""
        taken = {tensor: histogram_of(state.numpy()) for tensor, state in self._states.items()}
        for state in self._states.values():
            state.update_inplace(empty_state())
        return taken


def _value(key: int) -> float:
    bits = key ^ (_SIGN if key & _SIGN else _ALL_ONES)
    # Adding 0 turns -0 into 0.
    return float(np.uint32(bits).view(np.float32)) + 0.0
