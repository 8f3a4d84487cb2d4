"""How much memory a run would take, estimated before it runs.

ONNX's own shape inference, given the sizes of real inputs and the values of constant shapes, sees through
ConstantOfShape, Expand and Tile: a small file that asks for hundreds of gigabytes is recognised without allocating.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
import psutil
from google.protobuf.message import DecodeError, EncodeError

from ...calibrate.errors import ModelError
from ..data.feed import cut, samples_in
from .probe import Batch, Probe, nbytes


def estimate(proto: onnx.ModelProto, batch: Batch) -> dict[str, int]:
    """Return the bytes of every tensor whose shape is known once the inputs are as large as in ``batch``.

    Args:
        proto: The model; external data is not read. Its inputs' sizes are not changed.
        batch: Arrays by input.
    """
    sized = onnx.ModelProto()
    sized.CopyFrom(proto)
    for entry in sized.graph.input:
        if entry.name in batch and entry.type.HasField("tensor_type"):
            dims = [onnx.TensorShapeProto.Dimension(dim_value=size) for size in batch[entry.name].shape]
            entry.type.tensor_type.shape.CopyFrom(onnx.TensorShapeProto(dim=dims))
    del sized.graph.value_info[:]
    for entry in sized.graph.output:
        if entry.type.HasField("tensor_type"):
            entry.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(sized, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, EncodeError, DecodeError):
        # What cannot be inferred cannot be judged here; the runtime reports what is wrong with it.
        return {}
    return {entry.name: size for entry in [*inferred.value_info, *inferred.output] if (size := _bytes(entry))}


def check_memory(proto: onnx.ModelProto, sizes: Mapping[str, int], limit: int) -> None:
    """Refuse a model that makes a tensor of more than ``limit`` bytes.

    Raises:
        ModelError: Names the node and the size.
    """
    for node in proto.graph.node:
        for name in node.output:
            if sizes.get(name, 0) > limit:
                raise ModelError(
                    f"node {node.name or name!r} ({node.op_type}) would need {sizes[name] / 2**30:.1f} GiB",
                    where=f"tensor {name!r}",
                    found=f"{sizes[name]} bytes",
                    expected=f"at most {limit} bytes",
                    do="give smaller inputs, or raise --max-memory",
                )


class Budget:
    """Keeps a run within memory: refuses bombs, and cuts batches whose activations would not fit.

    Args:
        probe: What runs.
        max_memory: Bytes that one tensor may take; None for the machine's memory.
        batch_bytes: Bytes of activations that one run may hand out.
    """

    def __init__(self, probe: Probe, max_memory: int | None, batch_bytes: int) -> None:
        self._probe = probe
        self._max_memory = max_memory if max_memory is not None else int(psutil.virtual_memory().total)
        self._batch_bytes = batch_bytes
        self._judged = 0
        self._ratio = 0.0

    def pieces(self, batch: Batch) -> list[Batch]:
        """Return the batch, or parts of it along its first axis.

        Raises:
            ModelError: A tensor would be too large.
        """
        size = nbytes(batch)
        if size >= 2 * self._judged:
            skeleton = self._probe.skeleton()
            sizes = estimate(skeleton, batch)
            check_memory(skeleton, sizes, self._max_memory)
            self._judged = size
            self._ratio = sum(sizes.get(name, 0) for name in self._probe.fetched) / max(size, 1)
        count = min(-(-int(size * self._ratio) // self._batch_bytes), samples_in(batch))
        if count <= 1 or not self._probe.can_split:
            return [batch]
        step = -(-samples_in(batch) // count)
        return [cut(batch, start, start + step) for start in range(0, samples_in(batch), step)]


def _bytes(entry: onnx.ValueInfoProto) -> int:
    kind = entry.type.tensor_type
    if not kind.HasField("shape") or not all(dim.HasField("dim_value") for dim in kind.shape.dim):
        return 0
    if kind.elem_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        return 0
    width = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).itemsize
    return width * math.prod(dim.dim_value for dim in kind.shape.dim)
