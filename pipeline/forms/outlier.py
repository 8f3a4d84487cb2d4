"""``qpipe.OutlierMatMul``: int8 rows and columns, the planned outlier columns in floating point.

The node carries everything that the plugin's kernel needs; the model carries the operator's body in standard ONNX as a
model-local function, so that the same file runs without the plugin.

Source: Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...plugins.outlier_matmul import op as contract
from ..constants import dtype_name, weight_of
from ..layouts import layout_of
from ..plan import Decision
from . import FORMS, Workbench

OLDEST_BODY_OPSET = 15
"""CastLike, with which the body gives its result the type of its input."""


@FORMS.register("outlier")
def insert_outlier(bench: Workbench, node: gs.Node, decisions: list[Decision]) -> None:
    """Replace a MatMul or Gemm, and a constant Add behind it, by OutlierMatMul.

    The counter of new outliers is an output with a name of its own; `counters` makes an output of the graph of them.
    """
    decision = next(d for d in decisions if d.site.role == "weight")
    weight = weight_of(node.inputs[decision.site.index])
    assert weight is not None
    matrix = layout_of(node, weight.shape).matrix(np.asarray(weight.values()))
    x = node.inputs[0]
    x_dtype = contract.X_TYPES[[t.name for t in contract.X_TYPES].index(dtype_name(x) or "float32")]
    packed = contract.pack(matrix, list(decision.columns), x_dtype)
    bias, output = take_bias(node, matrix.shape[0])
    name = node.inputs[decision.site.index].name
    if bias is None:  # zeros cost nothing, and some runtimes cannot run the body without
        bias = np.zeros(matrix.shape[0], np.float32)
    arrays = {**packed.inputs(), "bias": bias.astype(np.float32)}
    constants = [bench.constant(f"{name}_{key}", array, onnx_type(array)) for key, array in arrays.items()]
    fresh = gs.Node(
        op=contract.OP_TYPE,
        name=bench.fresh(f"{node.name}_{contract.OP_TYPE}"),
        attrs={"limit": float(decision.limit), "padding": contract.PADDING},
        inputs=[x, *constants],
        outputs=[output, bench.variable(f"{node.name}_new_outliers")],
        domain=contract.DOMAIN,
    )
    bench.scope.nodes.append(fresh)
    key = f"{contract.DOMAIN}::{contract.OP_TYPE}"
    if key not in bench.functions or decision.limit > 0:
        opset = max(int(bench.graph.opset), OLDEST_BODY_OPSET)
        bench.functions[key] = contract.function_proto(opset=opset, dynamic=decision.limit > 0)


def take_bias(node: gs.Node, outputs: int) -> tuple[npt.NDArray[Any] | None, gs.Tensor]:
    """Cut ``node`` off from its result, with the Add of a constant [outputs] behind it when there is one.

    Args:
        node: MatMul or Gemm.
        outputs: Number of output channels.

    Returns:
        The bias [outputs], None without one, and the tensor that the replacement has to give.
    """
    output = node.outputs[0]
    bias = _vector(node.inputs[2], outputs) if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    node.outputs.clear()
    follower = output.outputs[0] if len(output.outputs) == 1 else None
    if bias is not None or follower is None or follower.op != "Add":
        return bias, output
    other = follower.inputs[1] if follower.inputs[0] is output else follower.inputs[0]
    found, result = _vector(other, outputs), follower.outputs[0]
    if found is None or (weight_of(other).shape != (outputs,) and not _is_matrix(output)):  # type: ignore[union-attr]
        return None, output
    follower.inputs.clear()
    follower.outputs.clear()
    return found, result


def _vector(tensor: gs.Tensor, size: int) -> npt.NDArray[Any] | None:
    constant = weight_of(tensor)
    if constant is None or constant.shape not in ((size,), (1, size)):
        return None
    return np.asarray(constant.values()).reshape(size)


def _is_matrix(tensor: gs.Tensor) -> bool:
    """Whether a tensor is known to have two dimensions or more: a row [1, N] then adds none to it."""
    return tensor.shape is not None and len(tensor.shape) >= 2


def onnx_type(array: npt.NDArray[Any]) -> str:
    """Return the ONNX name of an array's element type."""
    names = {"int8": "INT8", "int32": "INT32", "float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}
    return names[array.dtype.name]
