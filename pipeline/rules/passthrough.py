"""Operators that only move or select values: codes pass through them, so input and output share one scale."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ..constants import weight_of
from ..graph import values
from . import OpRule, add, add_each

_REASON = "moves values, does not compute"

add_each(
    (
        "Reshape",
        "Transpose",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Expand",
        "Tile",
        "DepthToSpace",
        "SpaceToDepth",
        "Identity",
        "Dropout",
        "Split",
    ),
    "passthrough",
    _REASON,
)
add_each(("MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "TopK"), "passthrough", "selects values")
add(OpRule(op="Concat", kind="passthrough", data=None, reason=_REASON))
add(OpRule(op="Where", kind="passthrough", data=(1, 2), reason="selects values"))


def _looks_up(node: gs.Node) -> str:
    is_table = weight_of(node.inputs[0]) is not None
    return "looks up rows of a constant table (an embedding), which stays in float" if is_table else ""


for _op in ("Gather", "GatherElements", "GatherND"):
    add(OpRule(op=_op, kind="passthrough", unless=_looks_up, reason="picks values"))


def _interpolates(node: gs.Node) -> str:
    mode = node.attrs.get("mode", "nearest")
    return "" if mode == "nearest" else f"interpolates ({mode}): integer kernels of it cut digits off"


def _pads_with_more_than_zero(node: gs.Node) -> str:
    if node.attrs.get("mode", "constant") != "constant":
        return ""
    value = node.attrs.get("value", 0.0)  # an attribute before opset 11, an input since
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        value = values(node.inputs[2]) if isinstance(node.inputs[2], gs.Constant) else np.nan
    return "" if np.all(np.asarray(value) == 0) else "pads with a value other than 0, which its scale need not hold"


add(OpRule(op="Resize", kind="passthrough", unless=_interpolates, reason="repeats values (nearest)"))
add(OpRule(op="Upsample", kind="passthrough", unless=_interpolates, reason="repeats values (nearest)"))
add(OpRule(op="Pad", kind="passthrough", unless=_pads_with_more_than_zero, reason="moves values and adds zeros"))
