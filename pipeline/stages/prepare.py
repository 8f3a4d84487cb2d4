"""Prepare: the graph that everything later works on. The same input always gives the same graph and names."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs
from onnx import GraphProto, TypeProto

from ...calibrate.errors import ModelError
from ..calibration.limits import INFERENCE_BYTES, headroom
from ..fresh import FreshNames
from ..graph import Model, all_graphs, check
from ..graph.exporter import skeleton
from ..graph.queries import STANDARD_DOMAINS
from ..ordering import sort_nodes
from ..passes import PASSES

FIRST_QDQ_OPSET = 10


def prepare(model: Model) -> Model:
    """Run all passes and complete the element types of tensors; ``model`` is changed in place and returned.

    Where no pass found anything, the graph is the one that was loaded, and that was checked.

    Raises:
        ModelError: A pass broke the graph (a bug), named by the stage.
    """
    sort_nodes(model.graph)
    names, changes = FreshNames(model.graph), 0
    for run in PASSES:
        changes += sum(run(graph, names) for graph in list(all_graphs(model.graph)))
    model.graph.cleanup(remove_unused_graph_inputs=False)
    sort_nodes(model.graph)
    infer_types(model)
    if changes:
        check(model, after="prepare")
    return model


def require_opset(model: Model) -> None:
    """Refuse a model whose opset has no QuantizeLinear.

    Raises:
        ModelError: The opset is below 10.
    """
    if model.opset < FIRST_QDQ_OPSET:
        raise ModelError(
            f"opset {model.opset} has no QuantizeLinear",
            where=str(model.path or "model in memory"),
            found=f"opset {model.opset}",
            expected=f"opset {FIRST_QDQ_OPSET} or newer, 13 for scales per channel",
            do="pass --upgrade, which converts it, or export it again at opset 13 or newer",
        )


def infer_types(model: Model) -> None:
    """Fill in element types and shapes that the file does not state, in bodies too; large weights are not looked at.

    Raises:
        ModelError: The model contradicts itself.
    """
    if not any(_is_open(t) for inner in all_graphs(model.graph) for n in inner.nodes for t in n.outputs):
        return
    try:
        inferred = _inferred(skeleton(model).proto)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise ModelError(
            "the types of the model's tensors cannot be inferred",
            where=str(model.path or "model in memory"),
            found=str(error).splitlines()[0],
            do="check the model with qpipe check; it contradicts itself",
        ) from error
    _take_types(inferred.graph, model.graph)
    for graph in all_graphs(model.graph):
        _complete_types(graph)


def _inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return ``proto`` with what can be inferred; following computed shapes may not take any amount of memory."""
    try:
        with headroom(INFERENCE_BYTES):
            return onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except MemoryError:
        return onnx.shape_inference.infer_shapes(proto)


def _is_open(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Variable) and tensor.dtype is None and not tensor.is_empty()


def _take_types(proto: GraphProto, graph: gs.Graph) -> None:
    """Take over what was inferred for the nodes of ``graph``, which ``proto`` lists in the same order."""
    known = {value.name: value.type for value in [*proto.value_info, *proto.output]}
    for node_proto, node in zip(proto.node, graph.nodes, strict=True):
        for tensor in node.outputs:
            if _is_open(tensor) and tensor.name in known:
                _set_type(tensor, known[tensor.name].tensor_type)
        bodies = {attribute.name: attribute.g for attribute in node_proto.attribute}
        for name, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                _take_types(bodies[name], value)


def _set_type(tensor: gs.Variable, kind: TypeProto.Tensor) -> None:
    if kind.elem_type:
        tensor.dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if kind.elem_type and kind.HasField("shape"):
        tensor.shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim]


def _complete_types(graph: gs.Graph) -> None:
    """Conclude from operators that have one type for several operands: behind an unknown operator nothing else can.

    ``MatMul(f(x), W)`` of an unknown ``f`` and a float32 ``W`` is float32, and so is ``f(x)``.
    """
    for node in graph.nodes:
        if (node.domain or "") not in STANDARD_DOMAINS or not onnx.defs.has(node.op, int(graph.opset)):
            continue
        schema = onnx.defs.get_schema(node.op, int(graph.opset))
        pairs = [*_with_types(node.inputs, schema.inputs), *_with_types(node.outputs, schema.outputs)]
        variables = {c.type_param_str for c in schema.type_constraints}
        types = {kind: t.dtype for t, kind in pairs if kind in variables and t.dtype is not None}
        for tensor, kind in pairs:
            if _is_open(tensor) and kind in types:
                tensor.dtype = types[kind]


def _with_types(
    tensors: list[gs.Tensor], formal: list[onnx.defs.OpSchema.FormalParameter]
) -> list[tuple[gs.Tensor, str]]:
    """Return each operand with the name of its type in the schema; the last formal one may stand for many."""
    found = []
    for index, tensor in enumerate(tensors):
        parameter = formal[min(index, len(formal) - 1)] if formal else None
        if parameter is not None and parameter.is_homogeneous and not tensor.is_empty():
            found.append((tensor, parameter.type_str))
    return found
