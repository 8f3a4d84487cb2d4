"""Is this graph a valid ONNX model? Asked after loading and after every stage, without its large weights."""

from __future__ import annotations

import re

import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from ...calibrate.errors import ModelError
from .exporter import skeleton
from .model import Model
from .protos import all_tensors, byte_size, without_weights
from .queries import all_graphs

_CONTEXT = re.compile(r"\s*==> Context: ")
_NODE = re.compile(r"(?:of node: |spec for node\. )n?N?ame: (?P<name>\S*) OpType: (?P<op>\S+)")


def check(model: Model, *, after: str) -> None:
    """Check the structure of a model, so that a wrong graph becomes an error at the stage that made it.

    Nodes must have names of their own, a name must mean one tensor in its graph, nodes must come after what they
    read, and the ONNX checker must accept the whole (large weights left out).

    Raises:
        ModelError: Something is wrong; names the stage ``after``.
    """
    nodes: set[str] = set()
    for graph in all_graphs(model.graph):
        _check_tensor_names(graph, after)
        for node in graph.nodes:
            if node.name and node.name in nodes:
                raise ModelError(f"two nodes are called {node.name!r} (after {after})", expected="one node per name")
            nodes.add(node.name)
    check_proto(skeleton(model).proto, where=str(model.path or "model in memory"), after=after)


def _check_tensor_names(graph: gs.Graph, after: str) -> None:
    known: dict[str, gs.Tensor] = {tensor.name: tensor for tensor in graph.inputs}
    for node in graph.nodes:
        for tensor in [*node.inputs, *node.outputs]:
            if tensor.name and known.setdefault(tensor.name, tensor) is not tensor:
                raise ModelError(
                    f"two tensors are called {tensor.name!r} (after {after})",
                    where=f"node {node.name!r} ({node.op})",
                    expected="one tensor per name",
                )


def check_proto(proto: onnx.ModelProto, *, where: str, after: str = "loading") -> None:
    """Check a model that holds its small tensors itself and refers to the others by key (``#...``).

    Raises:
        ModelError: With the reason and the node or tensor.
    """
    for tensor in all_tensors(proto):
        check_tensor(tensor, where=where)
    try:
        onnx.checker.check_model(without_weights(proto))
    except onnx.checker.ValidationError as error:
        reason, *contexts = _CONTEXT.split(" ".join(str(error).split()))
        node = _NODE.search(str(error).replace("\n", ""))
        raise ModelError(
            f"the model is not valid ONNX (after {after}): {reason}",
            where=f"{where}, node {node['name']!r} ({node['op']})" if node else where,
            found="; ".join(contexts) or None,
            do="export the model again; if qpipe wrote it, report this",
        ) from error


def check_tensor(tensor: TensorProto, *, where: str) -> None:
    """Check what reading a tensor relies on: a known type, sizes, and as many bytes as they ask for.

    Raises:
        ModelError: One of these is not so.
    """
    dims = list(tensor.dims)
    try:
        size = byte_size(tensor.data_type, dims)
    except KeyError as error:
        raise ModelError(f"tensor {tensor.name!r} has an unknown type", where=where, found=str(error)) from error
    if any(dim < 0 for dim in dims):
        raise ModelError(f"tensor {tensor.name!r} has a negative size", where=where, found=str(dims))
    if tensor.HasField("segment"):
        raise ModelError(f"tensor {tensor.name!r} is stored in segments, which ONNX gave up", where=where)
    is_text = tensor.data_type == TensorProto.STRING
    if tensor.data_location == TensorProto.EXTERNAL:
        if is_text:
            raise ModelError(f"text tensor {tensor.name!r} has external data", where=where)
    elif tensor.HasField("raw_data") and (is_text or len(tensor.raw_data) != size):
        raise ModelError(
            f"the data of tensor {tensor.name!r} does not fit its sizes {dims}",
            where=where,
            found=f"{len(tensor.raw_data)} bytes",
            expected="text" if is_text else f"{size} bytes",
        )
