"""From ONNX protobuf to `Model`: graphsurgeon's import, with what it drops kept beside.

graphsurgeon has no place for documentation and metadata of nodes and values, for types that are not tensors, for
inputs with default values and for some kinds of attributes. Each such rest is kept as a protobuf message in an
``origin`` attribute of the graph, node or variable it belongs to, and the exporter lays the graph's state over it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, NodeProto, ValueInfoProto
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.logger import G_LOGGER

from ...calibrate.errors import ModelError
from .constants import Values
from .exporter import schema_type, skeleton
from .model import Model
from .protos import keyed_tensors, location_of, numpy_type, without
from .queries import STANDARD_DOMAINS, all_graphs, constants

_PLAIN = {
    AttributeProto.FLOAT,
    AttributeProto.INT,
    AttributeProto.FLOATS,
    AttributeProto.INTS,
}
_LISTS = {AttributeProto.FLOATS, AttributeProto.INTS, AttributeProto.STRINGS}
_MARK = "\0qpipe-attribute-"


@dataclass(frozen=True, slots=True)
class NodeOrigin:
    """What a node was in the file: ``proto`` without inputs, outputs and attributes; ``name`` is the internal name."""

    name: str
    proto: NodeProto


def file_name_of(node: gs.Node) -> str:
    """Return the name under which a node is written: the file's own unless the node was renamed."""
    origin = vars(node).get("origin")
    return str(origin.proto.name if origin is not None and origin.name == node.name else node.name)


def from_proto(proto: onnx.ModelProto) -> Model:
    """Turn a protobuf model, all of it in memory, into a `Model`; ``proto`` is not changed.

    Nodes without a name, or with a name that another node has, get an internal one; the file keeps theirs.

    Raises:
        ModelError: A tensor refers to external data; only `load` knows from which folder that may be read.
    """
    for tensor in keyed_tensors(proto):
        raise ModelError(
            f"weight {tensor.name!r} refers to external data",
            expected="a model that is in memory as a whole",
            do="give the path of the model file instead of the protobuf message",
        )
    return adopt(without(proto), None, {})


def clone(model: Model) -> Model:
    """Return an independent copy of a model; weights are shared, they are never written to."""
    built = skeleton(model)
    copy = adopt(built.proto, model.path, built.weights)
    for old, new in zip(all_graphs(model.graph), all_graphs(copy.graph), strict=True):
        for old_node, new_node in zip(old.nodes, new.nodes, strict=True):
            new_node.name = old_node.name
            new_node.origin = vars(old_node).get("origin") or new_node.origin
    return copy


def adopt(proto: onnx.ModelProto, path: Path | None, weights: dict[str, Values]) -> Model:
    """Turn ``proto`` into a `Model` and take it over.

    Args:
        proto: The model; changed, and kept as the place where embedded weights live.
        path: File it was read from.
        weights: The values of tensors with external data, by the key that stands in their ``location``.
    """
    functions = [without(function) for function in proto.functions]
    shell = without(proto, "graph", "functions", "ir_version", "opset_import", "metadata_props")
    hidden = _hide_attributes(proto.graph)
    del proto.functions[:]
    # Its warnings are about types that it cannot hold; they are held here.
    G_LOGGER.severity = G_LOGGER.ERROR
    graph = gs.import_onnx(proto)
    _complete(proto.graph, graph, hidden)
    for inner in all_graphs(graph):
        _replace_values(inner, weights)
    _name_nodes(graph)
    graph.import_domains = None
    return Model(
        graph=graph,
        path=path,
        ir_version=proto.ir_version,
        metadata={entry.key: entry.value for entry in proto.metadata_props},
        domains={entry.domain: entry.version for entry in proto.opset_import if entry.domain not in STANDARD_DOMAINS},
        functions=functions,
        shell=shell,
        weights=weights,
    )


def _is_plain(attribute: AttributeProto, node: NodeProto) -> bool:
    if attribute.ref_attr_name or attribute.doc_string:
        return False
    if attribute.type in _LISTS and not (attribute.floats or attribute.ints or attribute.strings):
        return schema_type(node.op_type, node.domain, attribute.name) == attribute.type
    if attribute.type == AttributeProto.STRING:
        return _is_text(attribute.s)
    if attribute.type == AttributeProto.STRINGS:
        return all(_is_text(text) for text in attribute.strings)
    if attribute.type in (AttributeProto.TENSOR, AttributeProto.GRAPH):
        return attribute.HasField("t") or attribute.HasField("g")
    return attribute.type in _PLAIN


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _hide_attributes(graph: GraphProto) -> dict[str, AttributeProto]:
    """Put a marked string in the place of every attribute that graphsurgeon drops or cannot read; return them."""
    hidden: dict[str, AttributeProto] = {}
    stack = [graph]
    while stack:
        for node in stack.pop().node:
            for attribute in node.attribute:
                if _is_plain(attribute, node):
                    if attribute.type == AttributeProto.GRAPH:
                        stack.append(attribute.g)
                    continue
                mark = f"{_MARK}{len(hidden)}"
                kept = hidden[mark] = without(attribute)
                attribute.Clear()
                attribute.name, attribute.type, attribute.s = kept.name, AttributeProto.STRING, mark.encode()
    return hidden


def _complete(proto: GraphProto, graph: gs.Graph, hidden: dict[str, AttributeProto]) -> None:
    """Attach to ``graph`` and all inside it what graphsurgeon left behind."""
    rest = GraphProto(metadata_props=proto.metadata_props, quantization_annotation=proto.quantization_annotation)
    known = {initializer.name for initializer in proto.initializer}
    rest.input.extend(entry for entry in proto.input if entry.name in known)
    vars(graph)["origin"] = rest
    tensors = graph.tensors()
    for entry in [*proto.value_info, *proto.input, *proto.output]:
        tensor = tensors.get(entry.name)
        if isinstance(tensor, gs.Variable):
            _complete_variable(entry, tensor)
    for node_proto, node in zip(proto.node, graph.nodes, strict=True):
        _complete_node(node_proto, node)
        inner = {attribute.name: attribute.g for attribute in node_proto.attribute}
        for name, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                _complete(inner[name], value, hidden)
            elif isinstance(value, str) and value in hidden:
                node.attrs[name] = hidden[value]


def _complete_node(proto: NodeProto, node: gs.Node) -> None:
    rest = without(proto, "input", "output", "attribute", "op_type", "domain")
    node.origin = NodeOrigin(node.name, rest)


def _complete_variable(proto: ValueInfoProto, variable: gs.Variable) -> None:
    if isinstance(variable.dtype, int):
        variable.dtype = numpy_type(variable.dtype) if variable.dtype else None
    if proto.HasField("type") and not proto.type.HasField("tensor_type"):
        variable.dtype = None
    elif not (proto.doc_string or proto.metadata_props or proto.type.denotation or _has_denotation(proto)):
        return
    variable.origin = without(proto)


def _has_denotation(proto: ValueInfoProto) -> bool:
    return any(dim.denotation for dim in proto.type.tensor_type.shape.dim)


def _replace_values(graph: gs.Graph, weights: dict[str, Values]) -> None:
    for tensor in constants(graph):
        held = tensor._values
        if isinstance(held, LazyValues) and not isinstance(held, Values | SparseValues):
            tensor._values = weights.get(location_of(held.tensor)) or Values(held.tensor)
            tensor.data_location = None


def _name_nodes(graph: gs.Graph) -> None:
    """Give every node of the model a name that no other node has."""
    nodes = [node for inner in all_graphs(graph) for node in inner.nodes]
    taken = {node.name for node in nodes}
    seen: set[str] = set()
    numbers: dict[str, Iterator[int]] = {}
    for node in nodes:
        if not node.name or node.name in seen:
            base = node.name or node.op
            free = numbers.setdefault(base, itertools.count())
            node.name = next(name for number in free if (name := f"{base}_{number}") not in taken)
            taken.add(node.name)
            node.origin = NodeOrigin(node.name, node.origin.proto)
        seen.add(node.name)
