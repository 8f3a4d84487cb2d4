"""From `Model` to ONNX protobuf.

The export is a skeleton: large weights stand in it as tensors whose data lies at the in-memory location ``#key``, with
a table from key to values beside. The checker takes such a model as it is, a small model gets its weights filled in,
and a large one gets them streamed into a data file; the whole model is never one protobuf message.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import SparseValues

from ...calibrate.errors import ModelError
from .constants import KeyedValues, Values, stored
from .model import Model
from .protos import MAX_PROTO, embed, header, keyed_tensors, location_of, onnx_type_of, refer
from .queries import STANDARD_DOMAINS, all_graphs, constants

INLINE = 1024
"""Tensors up to this many bytes are always written into the model file itself: shapes, axes, scales."""


@dataclass
class Skeleton:
    """A model without its large weights.

    Attributes:
        proto: The model; a tensor without data has the ``location`` ``#key``.
        weights: The values by key.
    """

    proto: onnx.ModelProto
    weights: dict[str, Values] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes that the whole model takes."""
        inside = sum(self.weights[location_of(tensor)].nbytes for tensor in keyed_tensors(self.proto))
        return int(self.proto.ByteSize()) + inside

    def fill(self) -> None:
        """Put the data of all tensors that still lack it into the model."""
        self.fill_in(self.proto)

    def fill_in(self, message: Any) -> None:
        """Put the data of all tensors of a part of the model that still lack it into them."""
        for tensor in keyed_tensors(message):
            if location_of(tensor) in self.weights:
                embed(tensor, b"".join(self.weights[location_of(tensor)].chunks()))


def to_proto(model: Model) -> onnx.ModelProto:
    """Return the model as one protobuf message, all weights inside.

    Raises:
        ModelError: It would be larger than the 2 GiB that protobuf allows.
    """
    built = skeleton(model)
    if built.nbytes > MAX_PROTO:
        raise ModelError(
            "the model does not fit into one protobuf message",
            found=f"{built.nbytes} bytes",
            expected=f"at most {MAX_PROTO}",
            do="save it to a file; the weights then go into a data file of their own",
        )
    built.fill()
    return built.proto


def skeleton(model: Model) -> Skeleton:
    """Return the model without the data of its large weights."""
    built = Skeleton(onnx.ModelProto(), dict(model.weights))
    proto = built.proto
    proto.CopyFrom(model.shell)
    proto.ir_version = model.ir_version
    proto.opset_import.append(onnx.helper.make_opsetid("", model.opset))
    used = {node.domain for graph in all_graphs(model.graph) for node in graph.nodes if node.domain}
    versions = {**dict.fromkeys(sorted(used.difference(STANDARD_DOMAINS)), 1), **model.domains}
    proto.opset_import.extend(onnx.helper.make_opsetid(domain, versions[domain]) for domain in sorted(versions))
    for key in sorted(model.metadata):
        proto.metadata_props.add(key=key, value=model.metadata[key])
    proto.functions.extend(model.functions)
    proto.functions.extend(OnnxExporter.export_function(function) for function in model.graph.functions)
    _GraphExporter(built, model).export(model.graph, proto.graph)
    return built


class _GraphExporter:
    def __init__(self, built: Skeleton, model: Model) -> None:
        self._weights = built.weights
        self._old_format = model.ir_version < 4
        self._homes = _homes(model.graph)

    def export(self, graph: gs.Graph, proto: GraphProto) -> None:
        """Write ``graph`` into the empty ``proto``."""
        origin = vars(graph).get("origin")
        if origin is not None:
            proto.CopyFrom(origin)
            proto.ClearField("input")
        proto.name = graph.name
        if graph.doc_string:
            proto.doc_string = graph.doc_string
        local = self._homes.get(id(graph), [])
        for tensor in local:
            if isinstance(tensor._values, SparseValues):
                proto.sparse_initializer.append(tensor._values.tensor)
                proto.sparse_initializer[-1].values.name = tensor.name
            else:
                proto.initializer.append(self._tensor(tensor))
        proto.input.extend(value_info(tensor) for tensor in graph.inputs)
        proto.input.extend(self._default_inputs(graph, local))
        proto.output.extend(value_info(tensor) for tensor in graph.outputs)
        border = {tensor.name for tensor in [*graph.inputs, *graph.outputs]}
        for node in graph.nodes:
            self._node(node, proto.node.add())
            for tensor in node.outputs:
                if tensor.name not in border and (tensor.dtype is not None or "origin" in vars(tensor)):
                    proto.value_info.append(value_info(tensor))
                    border.add(tensor.name)

    def _default_inputs(self, graph: gs.Graph, local: list[gs.Constant]) -> Iterator[ValueInfoProto]:
        """Yield the inputs that are also initializers: all of them before IR version 4, else the file's own."""
        names = {tensor.name for tensor in local if not isinstance(tensor._values, SparseValues)}
        origin = vars(graph).get("origin")
        declared = {entry.name: entry for entry in origin.input} if origin is not None else {}
        for tensor in local:
            if tensor.name in declared and tensor.name in names:
                yield declared[tensor.name]
            elif self._old_format and tensor.name in names:
                yield value_info(tensor)

    def _tensor(self, tensor: gs.Constant) -> TensorProto:
        held = stored(tensor)
        if held.tensor.data_type != TensorProto.STRING and (held.nbytes > INLINE or isinstance(held, KeyedValues)):
            key = held.key if isinstance(held, KeyedValues) else f"#@{id(held)}"
            self._weights[key] = held
            proto = header(held.tensor)
            refer(proto, location=key)
        else:
            proto = TensorProto()
            proto.CopyFrom(held.tensor)
        if tensor.name:
            proto.name = tensor.name
        return proto

    def _node(self, node: gs.Node, proto: NodeProto) -> None:
        origin = vars(node).get("origin")
        if origin is not None:
            proto.CopyFrom(origin.proto)
        if origin is None or origin.name != node.name:
            proto.name = node.name
        proto.op_type = node.op
        proto.input.extend(tensor.name for tensor in node.inputs)
        proto.output.extend(tensor.name for tensor in node.outputs)
        if node.domain:
            proto.domain = node.domain
        for name, value in node.attrs.items():
            self._attribute(node, name, value, proto.attribute.add())

    def _attribute(self, node: gs.Node, name: str, value: Any, proto: AttributeProto) -> None:
        if isinstance(value, gs.Graph):
            proto.name, proto.type = name, AttributeProto.GRAPH
            self.export(value, proto.g)
        elif isinstance(value, gs.Constant):
            proto.name, proto.type = name, AttributeProto.TENSOR
            proto.t.CopyFrom(self._tensor(value))
        elif isinstance(value, AttributeProto):
            proto.CopyFrom(value)
            proto.name = name
        else:
            proto.CopyFrom(_plain_attribute(node, name, value))


def _plain_attribute(node: gs.Node, name: str, value: Any) -> AttributeProto:
    if isinstance(value, np.ndarray):
        value = onnx.numpy_helper.from_array(value)
    elif isinstance(value, type | np.dtype):
        value = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(value))
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list | tuple) and not value:
        # What an empty list is a list of, only the operator's schema says.
        return AttributeProto(name=name, type=schema_type(node.op, node.domain or "", name) or AttributeProto.INTS)
    return onnx.helper.make_attribute(name, value)


def schema_type(op: str, domain: str, attribute: str) -> int | None:
    """Return the type that an operator's schema gives an attribute, None when ONNX does not know it."""
    if not onnx.defs.has(op, domain):
        return None
    attributes = onnx.defs.get_schema(op, domain).attributes
    return int(attributes[attribute].type.value) if attribute in attributes else None


def value_info(tensor: gs.Tensor) -> ValueInfoProto:
    """Return the name, type and shape of a tensor, over what the file said about it."""
    proto = ValueInfoProto(name=tensor.name)
    origin = vars(tensor).get("origin")
    if origin is not None:
        proto.CopyFrom(origin)
        proto.name = tensor.name
    if tensor.dtype is None:
        return proto
    fresh = _type_proto(tensor.dtype, None if tensor.shape is None else tuple(tensor.shape))
    if origin is None:
        proto.type.CopyFrom(fresh)
    elif not _same_type(proto.type, fresh):
        denotation = proto.type.denotation
        proto.type.CopyFrom(fresh)
        if denotation:
            proto.type.denotation = denotation
    return proto


@functools.lru_cache(maxsize=1024)
def _type_proto(dtype: Any, shape: tuple[int | str | None, ...] | None) -> onnx.TypeProto:
    """Return the type of a tensor; not to be changed, for tensors of a model have few types and share them."""
    number = dtype if isinstance(dtype, int) else onnx_type_of(dtype)
    return onnx.helper.make_tensor_type_proto(number, shape)


def _same_type(one: onnx.TypeProto, other: onnx.TypeProto) -> bool:
    bare = onnx.TypeProto()
    bare.CopyFrom(one)
    bare.ClearField("denotation")
    for dim in bare.tensor_type.shape.dim if bare.tensor_type.HasField("shape") else ():
        dim.ClearField("denotation")
    return bool(bare == other)


def _homes(graph: gs.Graph) -> dict[int, list[gs.Constant]]:
    """Return the constants to declare in each graph, by ``id(graph)``: the innermost that encloses all their users."""
    paths: dict[int, tuple[gs.Constant, tuple[int, ...]]] = {}

    def visit(inner: gs.Graph, path: tuple[int, ...]) -> None:
        path = (*path, id(inner))
        attributes = {id(value) for node in inner.nodes for value in node.attrs.values()}
        for tensor in constants(inner):
            if id(tensor) not in attributes:
                known = paths.get(id(tensor))
                paths[id(tensor)] = (tensor, path if known is None else _common(known[1], path))
        for node in inner.nodes:
            for value in node.attrs.values():
                if isinstance(value, gs.Graph):
                    visit(value, path)

    visit(graph, ())
    homes: dict[int, list[gs.Constant]] = {}
    for tensor, path in paths.values():
        homes.setdefault(path[-1], []).append(tensor)
    return homes


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    count = sum(a == b for a, b in zip(one, other, strict=False))
    return one[:count]
