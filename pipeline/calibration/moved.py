"""Tensors that hold the values of another one in another layout: counting one of them is enough."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx

from ..graph.queries import STANDARD_DOMAINS

MOVES = frozenset({"Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"})
"""Operators whose output is their first input, value for value, in another order or shape."""


def moved(graph: onnx.GraphProto, tensors: Sequence[str], alone: Collection[str] = ()) -> dict[str, str]:
    """Return those of ``tensors`` that hold the values of another of them, and which.

    Args:
        graph: Main graph, topologically sorted.
        tensors: Names of activations.
        alone: Tensors to leave out, because more is wanted of them than what holds in any layout.
    """
    constants = {tensor.name for tensor in graph.initializer}
    inputs = {entry.name for entry in graph.input}
    wanted = set(tensors)
    had = wanted & (inputs | {name for node in graph.node for name in node.output}) - constants
    same: dict[str, str] = {}
    for node in graph.node:
        if node.op_type not in MOVES or node.domain not in STANDARD_DOMAINS or not node.input:
            continue
        source, target = node.input[0], node.output[0]
        if source in had and target in wanted and target not in alone:
            same[target] = same.get(source, source)
    return same
