"""Small questions that every pass asks of a graph."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

STANDARD_DOMAINS = ("", "ai.onnx")
"""Names of the domain of the standard operators."""


def all_graphs(graph: gs.Graph) -> Iterator[gs.Graph]:
    """Yield ``graph`` and every graph inside its nodes, outer before inner."""
    yield graph
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from all_graphs(value)


def constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    """Yield the constants that nodes of this one graph use, hold as an attribute, or that it gives out."""
    seen: set[int] = set()
    for node in graph.nodes:
        for tensor in [*node.inputs, *node.attrs.values()]:
            if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor
    for tensor in graph.outputs:
        if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """Return the node that computes ``tensor``, None for inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def consumers(tensor: gs.Tensor) -> list[gs.Node]:
    """Return the nodes that read ``tensor``, each once, in order; nodes inside subgraphs included."""
    found: list[gs.Node] = []
    for node in tensor.outputs:
        if not any(node is known for known in found):
            found.append(node)
    return found


def fresh_name(graph: gs.Graph, base: str) -> str:
    """Return ``base``, or ``base`` with a number, such that no tensor or node of the graph has the name.

    Names inside subgraphs count: an inner tensor must not hide an outer one.
    """
    taken: set[str] = set()
    for inner in all_graphs(graph):
        taken.update(inner.tensors())
        taken.update(node.name for node in inner.nodes)
    if base not in taken:
        return base
    number = 1
    while f"{base}_{number}" in taken:
        number += 1
    return f"{base}_{number}"
