"""``com.microsoft.DynamicQuantizeLSTM``: int8 weights, and activations that are quantized at every step.

The operator stores its weights ``[directions, in, gates * hidden]``, with scales and zero points
``[directions, gates * hidden]``, or ``[directions]`` where one scale serves a whole weight.

Source: ONNX Runtime, contrib operator DynamicQuantizeLSTM.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ..constants import weight_of
from ..plan import Decision
from . import FORMS, Workbench
from .stored import MICROSOFT

_INPUTS = 8
"""Inputs of an LSTM: X, W, R, B, sequence_lens, initial_h, initial_c, P."""


@FORMS.register("recurrent")
def insert_recurrent(bench: Workbench, node: gs.Node, decisions: list[Decision]) -> None:
    """Replace an LSTM by its counterpart with integer weights."""
    inputs = [*node.inputs, *(gs.Variable.empty() for _ in range(_INPUTS - len(node.inputs)))]
    for decision in (d for d in decisions if d.site.role == "weight"):
        slot = decision.site.index
        inputs[slot], scale, zero = _constants(bench, node, decision)
        inputs += [scale, zero]
    vars(node).pop("origin", None)
    node.op, node.domain, node.inputs = "DynamicQuantizeLSTM", MICROSOFT, inputs
    node.attrs.pop("layout", None)


def _constants(bench: Workbench, node: gs.Node, decision: Decision) -> tuple[gs.Constant, gs.Constant, gs.Constant]:
    """Return codes, scales and zero points of one weight."""
    tensor, qarray = node.inputs[decision.site.index], bench.weights[decision.site]
    weight = weight_of(tensor)
    assert weight is not None
    spec, directions = qarray.params.spec, qarray.q.shape[0]
    scale = qarray.params.scale
    scales = np.repeat(scale.reshape(1, -1), directions, axis=0) if scale.ndim else np.full(directions, scale)
    arrays = {
        "quantized": (np.ascontiguousarray(np.asarray(qarray.q).transpose(0, 2, 1)), spec.format.onnx_type),
        "scale": (scales, "FLOAT"),
        "zero_point": (np.zeros(scales.shape, spec.format.dtype), spec.format.onnx_type),
    }
    key = (weight.key, spec, id(qarray))
    codes, scale_constant, zero = (
        bench.shared_constant(("recurrent", what, *key), f"{tensor.name}_{what}", array, onnx_type)
        for what, (array, onnx_type) in arrays.items()
    )
    return codes, scale_constant, zero
