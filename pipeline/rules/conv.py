"""Convolutions.

Weight layouts: Conv ``W [out, in/group, k..]``; ConvTranspose ``W [in, out/group, k..]``.
Source: ONNX operators Conv-11 and ConvTranspose-11.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from . import OpRule, add


def _first(_node: gs.Node, _rank: int) -> int | None:
    return 0


def _second(_node: gs.Node, _rank: int) -> int | None:
    return 1


def _transposed_out(node: gs.Node, _rank: int) -> int | None:
    # With groups, one index of axis 1 serves `group` output channels at once: a shared scale, still correct.
    del node
    return 1


add(OpRule(op="Conv", kind="weighted", data=(0,), weight=1, bias=2, out_axis=_first, in_axis=_second))
add(OpRule(op="ConvTranspose", kind="weighted", data=(0,), weight=1, bias=2, out_axis=_transposed_out, in_axis=_first))
