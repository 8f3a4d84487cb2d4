"""Operators that only move or select values: codes pass through them, so input and output share one scale."""

from __future__ import annotations

from . import OpRule, add

_MOVES = (
    "Reshape",
    "Transpose",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Gather",
    "Expand",
    "Tile",
    "DepthToSpace",
    "SpaceToDepth",
    "MaxPool",
    "Identity",
    "Dropout",
    "Split",
)

for _op in _MOVES:
    add(OpRule(op=_op, kind="passthrough", data=(0,), reason="moves values, does not compute"))
add(OpRule(op="Concat", kind="passthrough", data=None, reason="moves values, does not compute"))
