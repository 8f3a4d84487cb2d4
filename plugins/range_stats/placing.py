"""Where counting nodes stand in a graph."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import GraphProto, NodeProto


def add_behind(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    """Add nodes to a graph, each right behind the node that makes its first input, or in front of all for an input.

    At the end of the list they would mean the same, but ONNX Runtime, which sorts the nodes before each of its passes,
    would take time that grows with the square of their number.
    """
    makers = {name: place for place, node in enumerate(graph.node) for name in node.output}
    places = iter([*range(len(graph.node)), *(makers.get(node.input[0], -1) for node in nodes)])
    graph.node.extend(nodes)
    graph.node.sort(key=lambda _: next(places))  # moves nodes without a copy of what they hold
