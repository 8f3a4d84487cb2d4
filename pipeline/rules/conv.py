"""Convolutions.

Weight layouts: Conv ``W [out, in/group, k..]``; ConvTranspose ``W [in, out/group, k..]``. With groups, one index of
axis 1 of a ConvTranspose serves ``group`` output channels: they share a scale.

Source: ONNX operators Conv-11 and ConvTranspose-11.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from . import OpRule, add


def _first(_node: gs.Node, _rank: int) -> int | None:
    return 0


def _second(_node: gs.Node, _rank: int) -> int | None:
    return 1


_REASON = "multiplies by a weight: runs on codes"

add(OpRule(op="Conv", kind="weighted", data=(0, 1), weight=1, bias=2, out_axis=_first, in_axis=_second, reason=_REASON))
add(
    OpRule(
        op="ConvTranspose",
        kind="weighted",
        data=(0, 1),
        weight=1,
        bias=2,
        out_axis=_second,
        in_axis=_first,
        reason=_REASON,
    )
)
