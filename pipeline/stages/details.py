"""Which layer inputs get more statistics than a histogram, and which: what `collect` is told."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping

import onnx
import onnx_graphsurgeon as gs

from ...calibrate.errors import UnsupportedError
from ...calibrate.stats.tokens import Window
from ..calibration.observe import Detail
from ..constants import weight_of
from ..graph import all_graphs
from ..rules import RULES, OpRule, rule_of

LEVELS = ("none", "channels", "gram", "auto")
"""``channels``: magnitudes per channel of what MatMul and Gemm read. ``gram``: XᵀX as well, and of Convs too. ``auto``:
as ``gram`` where all these matrices together stay small, else ``channels``."""

AUTO_GRAM_BYTES = 1 << 29
"""Most that ``auto`` spends on XᵀX of all layers: a model of this size calibrates in seconds, its file stays handy."""


def wanted_details(graph: gs.Graph, level: str) -> dict[str, Detail]:
    """Return what to collect of the inputs of weighted operators.

    Args:
        graph: Prepared float graph.
        level: One of `LEVELS`.
    """
    details: dict[str, Detail] = {}
    if level == "none":
        return details
    whole = level == "gram" or (level == "auto" and _gram_bytes(graph, None) <= AUTO_GRAM_BYTES)
    for node, _, _ in _weighted(graph):
        name = node.inputs[0].name
        if node.op in ("MatMul", "Gemm"):
            details[name] = Detail(axis=-1, gram=whole)
        elif node.op == "Conv" and whole and name not in details:
            window = window_of(node)
            if window is not None:
                details[name] = Detail(axis=1, window=window, gram=True)
    return details


def require_memory(graph: gs.Graph, details: Mapping[str, Detail], memory: int) -> None:
    """Refuse, before anything runs, Gram matrices that do not fit: they grow with the square of a layer's width.

    Args:
        graph: The graph that `wanted_details` was given.
        details: What it returned.
        memory: Bytes that there are.

    Raises:
        UnsupportedError: They need more.
    """
    wanted = {name for name, detail in details.items() if detail.gram}
    needed = _gram_bytes(graph, wanted)
    if needed > memory:
        raise UnsupportedError(
            f"XᵀX of {len(wanted)} layer inputs does not fit into memory",
            found=f"{needed / 1e9:.1f} GB",
            expected=f"at most {memory / 1e9:.1f} GB",
            do="collect with --detail channels and use an algorithm that needs no more, rtn or hqq",
        )


def _gram_bytes(graph: gs.Graph, names: Collection[str] | None) -> int:
    """Return the size of XᵀX of the layer inputs of these names, of all where None, in float64."""
    widths: dict[str, int] = {}
    for node, rule, shape in _weighted(graph):
        name = node.inputs[0].name
        if node.op not in ("MatMul", "Gemm", "Conv") or (names is not None and name not in names):
            continue
        axis = rule.out_axis(node, len(shape))
        # The weight of a MatMul of higher rank is a stack of matrices that read the same channels.
        matrix = shape if node.op == "Conv" or axis is not None else shape[-2:]
        widths[name] = math.prod(matrix) // max(matrix[axis if axis is not None else -1], 1)
    return sum(8 * width**2 for width in widths.values())


def _weighted(graph: gs.Graph) -> Iterator[tuple[gs.Node, OpRule, tuple[int, ...]]]:
    """Yield the operators that multiply by a constant weight, each with its rule and the shape of the weight."""
    for node in (node for inner in all_graphs(graph) for node in inner.nodes):
        rule = rule_of(node)
        if rule is None or rule.kind != "weighted" or rule.weight is None:
            continue
        if (weight := weight_of(node.inputs[rule.weight])) is not None:
            yield node, rule, weight.shape


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


def window_of(node: gs.Node) -> Window | None:
    """Return how a Conv without groups reads its input; None where patches cannot stand for it."""
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
