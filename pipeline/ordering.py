"""The order of nodes in a graph."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from .graph import all_graphs


def sort_nodes(graph: gs.Graph) -> None:
    """Sort the nodes of a graph and of all bodies in it; see `sorted_nodes`."""
    for inner in list(all_graphs(graph)):
        inner.nodes = sorted_nodes(inner)


def sorted_nodes(graph: gs.Graph) -> list[gs.Node]:
    """Return the nodes of one graph so that each comes after what it reads, and otherwise in their order.

    What was added at the end comes right before its first reader.
    """
    local = {id(node): node for node in graph.nodes}
    done: set[int] = set()
    order: list[gs.Node] = []
    for root in graph.nodes:
        stack = [(root, False)]
        while stack:
            node, is_ready = stack.pop()
            if is_ready:
                order.append(node)
            elif id(node) not in done:
                done.add(id(node))
                stack.append((node, True))
                stack.extend((before, False) for before in reversed(_before(node)) if id(before) in local)
    return order


def _before(node: gs.Node) -> list[gs.Node]:
    """Return the nodes whose results a node reads, itself or in its bodies."""
    tensors = list(node.inputs)
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in all_graphs(value):
                tensors.extend(tensor for reader in inner.nodes for tensor in reader.inputs)
                tensors.extend(inner.outputs)
    return [tensor.inputs[0] for tensor in tensors if tensor.inputs]
