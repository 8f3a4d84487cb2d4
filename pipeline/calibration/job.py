"""What to observe, and how: what every process of a collection is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import psutil

from ...calibrate.stats.extrema import HALF_SENTINEL, SENTINEL
from .lanes import processors
from .observe import Detail


def machine_memory() -> int:
    """Return the bytes of memory that this machine has."""
    return int(psutil.virtual_memory().total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to observe, and how.

    Attributes:
        tensors: Names of activations.
        details: What to collect of a tensor beside its histogram.
        sentinel: Magnitude from which finite values are masks; in float16 tensors `HALF_SENTINEL` at most.
        allow_nonfinite: Accept NaN and infinities in the model's outputs.
        device: As for `make_session`.
        threads: As for `make_session`; as many threads count, between runs.
        lanes: Batches that run at a time; fewer where they would not fit `batch_bytes` together, one where each would
            take memory of another kind: a device's, a large model's weights, matrices over channels.
        native: Count inside the graph where the plugin can; the result is the same.
        op_libraries: As for `SessionExtras`.
        tensor_bytes: Refuse a model that makes a tensor of more.
        batch_bytes: Bytes of activations that runs at a time may hold; one alone may hand out a quarter of it.
    """

    tensors: tuple[str, ...]
    details: Mapping[str, Detail] = field(default_factory=dict)
    sentinel: float = SENTINEL
    allow_nonfinite: bool = False
    device: str = "cpu"
    threads: int | None = None
    lanes: int = 1
    native: bool = True
    op_libraries: tuple[Path, ...] = ()
    tensor_bytes: int = field(default_factory=machine_memory)
    batch_bytes: int = 2**31

    @property
    def session_threads(self) -> int | None:
        """Threads inside one operator, None for ONNX Runtime's choice; each lane brings one, the rest is shared."""
        return self.threads if self.lanes == 1 else max((self.threads or processors()) - self.lanes + 1, 1)

    def sentinel_of(self, onnx_type: int) -> float:
        """Return the magnitude from which values of a tensor of this ONNX type are masks."""
        return min(self.sentinel, HALF_SENTINEL) if onnx_type == onnx.TensorProto.FLOAT16 else self.sentinel
