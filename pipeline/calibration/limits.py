"""What is known of a model's tensors before it runs, above all how much memory they would take.

ONNX's own shape inference, given the sizes of real inputs and the values of constant shapes, sees through
ConstantOfShape, Expand and Tile: a small file that asks for hundreds of gigabytes is recognised without allocating.
Inference that follows computed shapes writes out the values of small integer tensors and can itself be made to take
any amount of memory; it therefore comes second, and under a limit of its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError

from ...calibrate.errors import ModelError
from ..data import Batch

INFERENCE_BYTES = 2**30
"""What shape inference may take beyond what the process holds; for honest models it is megabytes."""


class Known(NamedTuple):
    """What is known of a tensor before it is computed: its ONNX type (0 if unknown) and bytes (0 if unknown)."""

    onnx_type: int
    nbytes: int


def survey(proto: onnx.ModelProto, batch: Batch, limit: int) -> dict[str, Known]:
    """Tell what is known of the tensors of a model, and refuse one of more than ``limit`` bytes.

    Args:
        proto: The model; external data is not read.
        batch: Arrays by input; none for what is known whatever the inputs are.
        limit: Bytes that one tensor may take.

    Returns:
        Type and bytes by tensor of the main graph.

    Raises:
        ModelError: Names the node and the size.
    """
    sized = _with_sizes(proto, batch)
    found: dict[str, Known] = {}
    for follow_values in (False, True):
        try:
            with headroom(INFERENCE_BYTES):
                inferred = onnx.shape_inference.infer_shapes(sized, data_prop=follow_values).graph
        except MemoryError as error:
            raise ModelError(
                "a tensor of the model is too large even to work out its shape",
                found=f"shape inference that needs over {INFERENCE_BYTES / 2**30:.3g} GiB",
                do="look at the nodes that compute shapes: ConstantOfShape, Expand, Range",
            ) from error
        except (onnx.shape_inference.InferenceError, EncodeError, DecodeError):
            # What cannot be inferred cannot be judged here; the runtime reports what is wrong with it.
            continue
        entries = [*inferred.input, *inferred.value_info, *inferred.output]
        found |= {entry.name: Known(entry.type.tensor_type.elem_type, _bytes(entry)) for entry in entries}
        _refuse_huge(proto, found, limit)
    return found


@contextlib.contextmanager
def headroom(nbytes: int) -> Iterator[None]:
    """Let this process map at most ``nbytes`` more while the block runs; no limit where the system has none."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + nbytes
    lowest = min([wanted, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _with_sizes(proto: onnx.ModelProto, batch: Batch) -> onnx.ModelProto:
    """Return a copy whose inputs are as large as in ``batch`` and whose other shapes are open."""
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
    return sized


def _refuse_huge(proto: onnx.ModelProto, known: Mapping[str, Known], limit: int) -> None:
    for node in proto.graph.node:
        for name in node.output:
            size = known[name].nbytes if name in known else 0
            if size > limit:
                raise ModelError(
                    f"node {node.name or name!r} ({node.op_type}) would need {size / 2**30:.3g} GiB",
                    where=f"tensor {name!r}",
                    found=f"{size} bytes",
                    expected=f"at most {limit} bytes",
                    do="give smaller inputs, or raise --max-memory",
                )


def _bytes(entry: onnx.ValueInfoProto) -> int:
    kind = entry.type.tensor_type
    if not kind.HasField("shape") or not all(dim.HasField("dim_value") for dim in kind.shape.dim):
        return 0
    if kind.elem_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        return 0
    width = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).itemsize
    return width * math.prod(dim.dim_value for dim in kind.shape.dim)
