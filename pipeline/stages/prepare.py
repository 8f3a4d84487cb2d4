"""Prepare: the graph that everything later works on. The same input always gives the same graph and names."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from ...calibrate.errors import ModelError
from ..graph import Model, check
from ..graph.exporter import skeleton
from ..passes import PASSES

FIRST_QDQ_OPSET = 10


def prepare(model: Model) -> Model:
    """Run all passes and complete the element types of tensors; ``model`` is changed in place and returned.

    Raises:
        ModelError: A pass broke the graph (a bug), named by the stage.
    """
    model.graph.toposort()
    for run in PASSES:
        run(model.graph)
    model.graph.toposort()
    infer_types(model)
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
            do="qpipe quantize with --upgrade converts it, or export it again at opset 13 or newer",
        )


def infer_types(model: Model) -> None:
    """Fill in element types and shapes that the file does not state; large weights are not looked at."""
    unknown = [t for t in model.graph.tensors().values() if isinstance(t, gs.Variable) and t.dtype is None]
    if not unknown:
        return
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton(model).proto, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise ModelError(
            "the types of the model's tensors cannot be inferred",
            where=str(model.path or "model in memory"),
            found=str(error).splitlines()[0],
            do="check the model with qpipe check; it contradicts itself",
        ) from error
    known = {value.name: value.type.tensor_type for value in inferred.graph.value_info}
    for tensor in unknown:
        if tensor.name in known and known[tensor.name].elem_type:
            kind = known[tensor.name]
            tensor.dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
            if kind.HasField("shape"):
                tensor.shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim]
