"""Upgrade: a model of another opset, by ONNX's own version converter, or by its number alone where nothing changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto

from ...calibrate.errors import UnsupportedError
from ..graph import Model
from ..graph.exporter import skeleton
from ..graph.importer import adopt
from ..graph.queries import STANDARD_DOMAINS

UPGRADE_OPSET = 17
_FIRST_MODERN_OPSET = 13
_FIRST_RESIZE_WITH_MODES = 11
_FIRST_SCAN_WITHOUT_BATCH = 9
_INPUTS_FREE_IR = 4


def upgrade(model: Model, opset: int = UPGRADE_OPSET) -> Model:
    """Return ``model`` converted to ``opset``; models that can carry scales per channel come back unchanged.

    Raises:
        UnsupportedError: The converter knows no way for one of the operators.
    """
    return model if model.opset >= _FIRST_MODERN_OPSET else move_opset(model, opset)


def move_opset(model: Model, opset: int) -> Model:
    """Return ``model`` at ``opset``: with another number alone where its operators did not change, else converted.

    Large weights are not looked at.

    Raises:
        UnsupportedError: The converter knows no way for one of the operators, or one inside a function has changed.
    """
    built = skeleton(model)
    changed = _changed(built.proto, opset)
    inside = [name for function, name in changed if function]
    if inside:
        raise _refusal(model, opset, f"the operators {', '.join(inside)} inside model-local functions have changed")
    if changed:
        proto = _converted(model, built.proto, opset)
    else:
        proto = built.proto
        for entry in proto.opset_import:
            entry.version = opset if entry.domain in STANDARD_DOMAINS else entry.version
    for entry in (entry for function in proto.functions for entry in function.opset_import):
        entry.version = opset if entry.domain in STANDARD_DOMAINS else entry.version
    return adopt(proto, model.path, built.weights)


def _changed(proto: ModelProto, opset: int) -> list[tuple[str, str]]:
    """Return the function (``""`` for none) and type of each operator that is another one at ``opset``."""
    found: dict[tuple[str, str], None] = {}
    bodies: list[tuple[str, GraphProto | FunctionProto]] = [("", proto.graph), *((f.name, f) for f in proto.functions)]
    for name, body in bodies:
        imports = body.opset_import if isinstance(body, FunctionProto) else proto.opset_import
        now = next((entry.version for entry in imports if entry.domain in STANDARD_DOMAINS), opset)
        for node in _all_nodes(body):
            if node.domain in STANDARD_DOMAINS and _since(node.op_type, now) != _since(node.op_type, opset):
                found[name, node.op_type] = None
    return list(found)


def _since(op: str, opset: int) -> int:
    return int(onnx.defs.get_schema(op, opset).since_version) if onnx.defs.has(op, opset) else 0


def _all_nodes(body: GraphProto | FunctionProto) -> Iterator[NodeProto]:
    for node in body.node:
        yield node
        for inner in _graphs_of(node):
            yield from _all_nodes(inner)


def _graphs_of(node: NodeProto) -> Iterator[GraphProto]:
    return (attribute.g for attribute in node.attribute if attribute.type == AttributeProto.GRAPH)


def _converted(model: Model, proto: ModelProto, opset: int) -> ModelProto:
    if model.opset < _FIRST_SCAN_WITHOUT_BATCH and any(node.op_type == "Scan" for node in _all_nodes(proto.graph)):
        raise _refusal(model, opset, "a Scan of opset 8 goes over batches of sequences, which the converter overlooks")
    known = set(_written(proto.graph))
    # Before IR version 4 weights had to be inputs too; since then it says that they may be overridden.
    inputs = {entry.name for entry in proto.graph.input if model.ir_version >= _INPUTS_FREE_IR}
    functions = list(proto.functions)
    border = {entry.name: entry.type for entry in [*proto.graph.input, *proto.graph.output]}
    _list_weights_as_inputs(proto)
    try:
        result = onnx.version_converter.convert_version(proto, opset)
    except (RuntimeError, ValueError) as error:
        # What stands before is a place in the converter's own source.
        raise _refusal(model, opset, str(error).splitlines()[0].rpartition("failed: ")[2]) from error
    weights = {tensor.name for tensor in result.graph.initializer} - inputs
    kept = [value for value in result.graph.input if value.name not in weights]
    del result.graph.input[:]
    result.graph.input.extend(kept)
    for entry in (entry for entry in [*result.graph.input, *result.graph.output] if entry.name in border):
        entry.type.CopyFrom(border[entry.name])  # The converter gives free dimensions names of its own.
    result.ir_version = max(model.ir_version, _INPUTS_FREE_IR)
    result.functions.extend(functions)
    _rename_new(result.graph, known, itertools.count(), {})
    if model.opset < _FIRST_RESIZE_WITH_MODES:
        _keep_old_resize(result.graph)
    return result


def _list_weights_as_inputs(proto: ModelProto) -> None:
    """The converter of old opsets finds a weight only among the inputs, as IR version 3 had it."""
    known = {value.name for value in proto.graph.input}
    for tensor in proto.graph.initializer:
        if tensor.name not in known:
            proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    proto.ir_version = min(proto.ir_version, _INPUTS_FREE_IR - 1)


def _written(graph: GraphProto) -> Iterator[str]:
    return (name for node in _all_nodes(graph) for name in node.output)


def _rename_new(graph: GraphProto, known: set[str], numbers: Iterator[int], outer: dict[str, str]) -> None:
    """Give tensors that the converter made names of their own: it uses the same ones in every body."""
    names = dict(outer)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        for name in (name for name in node.output if name and name not in known):
            names[name] = next(new for n in numbers if (new := f"upgraded_{n}") not in known)
        node.output[:] = [names.get(name, name) for name in node.output]
        for inner in _graphs_of(node):
            _rename_new(inner, known, numbers, names)


def _keep_old_resize(graph: GraphProto) -> None:
    """Upsample, and Resize before opset 11, placed the pixels of their result by another rule than today's default."""
    for node in _all_nodes(graph):
        if node.op_type == "Resize" and not any(a.name == "coordinate_transformation_mode" for a in node.attribute):
            node.attribute.append(onnx.helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
            node.attribute.append(onnx.helper.make_attribute("nearest_mode", "floor"))


def _refusal(model: Model, opset: int, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"the model cannot be brought from opset {model.opset} to {opset}",
        where=str(model.path or "model in memory"),
        found=found,
        do=f"export it again at opset {opset} or newer",
    )
