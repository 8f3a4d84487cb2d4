"""From ONNX protobuf to `Model`: graphsurgeon's import, with what it drops kept beside.

graphsurgeon has no place for documentation and metadata of nodes and values, for types that are not tensors, for
inputs with default values and for some kinds of attributes. Each such rest is kept as a protobuf message in an
``origin`` attribute of the graph, node or variable it belongs to, and the exporter lays the graph's state over it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.logger import G_LOGGER

from .constants import FileValues, KeyedValues, Values, numpy_type
from .external import FileRange
from .model import Model

_PLAIN = {
    AttributeProto.FLOAT,
    AttributeProto.INT,
    AttributeProto.TENSOR,
    AttributeProto.GRAPH,
    AttributeProto.FLOATS,
    AttributeProto.INTS,
}
_MARK = "\0qpipe-attribute-"
STANDARD_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True, slots=True)
class NodeOrigin:
    """What a node was in the file: ``proto`` without inputs, outputs and attributes; ``name`` is the internal name."""

    name: str
    proto: NodeProto


def from_proto(proto: onnx.ModelProto) -> Model:
    """Turn a protobuf model, all of it in memory, into a `Model`; ``proto`` is not changed.

    Nodes without a name, or with a name that another node has, get an internal one; the file keeps theirs.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return adopt(copy, None, {})


def adopt(proto: onnx.ModelProto, path: Path | None, files: dict[str, FileRange]) -> Model:
    """Turn ``proto`` into a `Model` and take it over.

    Args:
        proto: The model; changed, and kept as the place where embedded weights live.
        path: File it was read from.
        files: Where the external data of tensors lies, by the ``location`` that the tensors carry.
    """
    functions = [_copy(function) for function in proto.functions]
    shell = onnx.ModelProto()
    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        if proto.HasField(name):
            setattr(shell, name, getattr(proto, name))
    shell.training_info.extend(proto.training_info)
    shell.configuration.extend(proto.configuration)
    hidden = _hide_attributes(proto.graph)
    del proto.functions[:]
    G_LOGGER.severity = G_LOGGER.ERROR
    graph = gs.import_onnx(proto)
    _complete(proto.graph, graph, hidden)
    for inner in all_graphs(graph):
        _replace_values(inner, files)
    _name_nodes(graph)
    graph.import_domains = None
    model = Model(
        graph=graph,
        path=path,
        ir_version=proto.ir_version,
        metadata={entry.key: entry.value for entry in proto.metadata_props},
        domains={entry.domain: entry.version for entry in proto.opset_import if entry.domain not in STANDARD_DOMAINS},
        functions=functions,
        shell=shell,
    )
    return model


def all_graphs(graph: gs.Graph) -> Iterator[gs.Graph]:
    """Yield ``graph`` and every graph inside its nodes, outer before inner."""
    yield graph
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from all_graphs(value)


def constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    """Yield the constants that nodes of this one graph use, hold as an attribute, or that it gives out."""
    seen: set[int] = set()
    for node in graph.nodes:
        for tensor in [*node.inputs, *node.attrs.values()]:
            if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor
    for tensor in graph.outputs:
        if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def _copy(message: onnx.FunctionProto) -> onnx.FunctionProto:
    copy = onnx.FunctionProto()
    copy.CopyFrom(message)
    return copy


def _is_plain(attribute: AttributeProto) -> bool:
    if attribute.ref_attr_name or attribute.doc_string:
        return False
    if attribute.type == AttributeProto.STRING:
        return _is_text(attribute.s)
    if attribute.type == AttributeProto.STRINGS:
        return all(_is_text(text) for text in attribute.strings)
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
                if _is_plain(attribute):
                    if attribute.type == AttributeProto.GRAPH:
                        stack.append(attribute.g)
                    continue
                mark = f"{_MARK}{len(hidden)}"
                kept = hidden[mark] = AttributeProto()
                kept.CopyFrom(attribute)
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
    rest = NodeProto(
        name=proto.name,
        doc_string=proto.doc_string,
        overload=proto.overload,
        metadata_props=proto.metadata_props,
        device_configurations=proto.device_configurations,
    )
    node.origin = NodeOrigin(node.name, rest)


def _complete_variable(proto: ValueInfoProto, variable: gs.Variable) -> None:
    if isinstance(variable.dtype, int):
        variable.dtype = numpy_type(variable.dtype) if variable.dtype else None
    if proto.HasField("type") and not proto.type.HasField("tensor_type"):
        variable.dtype = None
    elif not (proto.doc_string or proto.metadata_props or proto.type.denotation or _has_denotation(proto)):
        return
    variable.origin = ValueInfoProto()
    variable.origin.CopyFrom(proto)


def _has_denotation(proto: ValueInfoProto) -> bool:
    return any(dim.denotation for dim in proto.type.tensor_type.shape.dim)


def _replace_values(graph: gs.Graph, files: dict[str, FileRange]) -> None:
    for tensor in constants(graph):
        stored = tensor._values
        if isinstance(stored, LazyValues) and not isinstance(stored, Values | SparseValues):
            tensor._values = wrap(stored.tensor, files)
            tensor.data_location = None


def wrap(tensor: TensorProto, files: dict[str, FileRange]) -> Values:
    """Return the `Values` of a tensor, wherever its data lies."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return Values(tensor)
    location = next(entry.value for entry in tensor.external_data if entry.key == "location")
    return FileValues(tensor, files[location])


def _name_nodes(graph: gs.Graph) -> None:
    """Give every node of the model a name that no other node has."""
    nodes = [node for inner in all_graphs(graph) for node in inner.nodes]
    taken = {node.name for node in nodes}
    seen: set[str] = set()
    for node in nodes:
        if not node.name or node.name in seen:
            base = node.name or node.op
            number = 0
            while f"{base}_{number}" in taken:
                number += 1
            node.name = f"{base}_{number}"
            taken.add(node.name)
            node.origin = NodeOrigin(node.name, node.origin.proto)
        seen.add(node.name)


__all__ = ["KeyedValues", "adopt", "all_graphs", "constants", "from_proto", "wrap"]
