"""Which layer inputs get more statistics than a histogram, and which: what `collect` is told."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx_graphsurgeon as gs

from ...calibrate.stats.tokens import Window
from ..calibration.observe import Detail
from ..constants import weight_of
from ..graph import all_graphs
from ..rules import RULES, rule_of

LEVELS = ("none", "channels", "gram")
"""``channels``: magnitudes per channel of what MatMul and Gemm read. ``gram``: XᵀX as well, and of Convs too."""


def wanted_details(graph: gs.Graph, level: str) -> dict[str, Detail]:
    """Return what to collect of the inputs of weighted operators.

    Args:
        graph: Prepared float graph.
        level: One of `LEVELS`.
    """
    details: dict[str, Detail] = {}
    if level == "none":
        return details
    for node in (node for inner in all_graphs(graph) for node in inner.nodes):
        rule = rule_of(node)
        if (
            rule is None
            or rule.kind != "weighted"
            or rule.weight is None
            or weight_of(node.inputs[rule.weight]) is None
        ):
            continue
        name = node.inputs[0].name
        if node.op in ("MatMul", "Gemm"):
            details[name] = Detail(axis=-1, gram=level == "gram")
        elif node.op == "Conv" and level == "gram" and name not in details:
            window = _window(node)
            if window is not None:
                details[name] = Detail(axis=1, window=window, gram=True)
    return details


def hidden_tensors(functions: Iterable[onnx.FunctionProto]) -> list[str]:
    """Return the tensors inside model-local functions that a rule would ask for, were they in the graph.

    They cannot be collected, since every call computes others under the same name; asking for them has them named in
    the result.
    """
    wanted: dict[str, None] = {}
    for function in functions:
        for node in function.node:
            rule = RULES.get(node.op_type) if not node.domain and node.op_type in RULES else None
            if rule is not None and rule.kind != "float":
                wanted |= dict.fromkeys(name for name in node.output if name)
    return list(wanted)


def _window(node: gs.Node) -> Window | None:
    weight = weight_of(node.inputs[1])
    if weight is None or node.attrs.get("auto_pad", "NOTSET") != "NOTSET" or node.attrs.get("group", 1) != 1:
        return None
    rank = len(weight.shape) - 2
    return Window(
        kernel_shape=tuple(weight.shape[2:]),
        strides=tuple(node.attrs.get("strides", [1] * rank)),
        dilations=tuple(node.attrs.get("dilations", [1] * rank)),
        pads=tuple(node.attrs.get("pads", [0] * 2 * rank)),
    )
