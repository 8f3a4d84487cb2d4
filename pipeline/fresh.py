"""Names that nothing in a model has yet."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from .graph import all_graphs


class FreshNames:
    """Gives out names that no tensor and no node of a graph has, bodies included: an inner name must not hide an outer.

    The names are collected once, so that a graph of n nodes costs n steps and not n squared.

    Args:
        graph: The main graph.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self._taken: set[str] = set()
        self._numbers: dict[str, int] = {}
        for inner in all_graphs(graph):
            self._taken.update(inner.tensors())
            self._taken.update(node.name for node in inner.nodes)

    def __call__(self, base: str) -> str:
        """Return ``base``, or ``base`` with a number; it counts as taken from now on."""
        name, number = base, self._numbers.get(base, 0)
        while name in self._taken:
            number += 1
            name = f"{base}_{number}"
        self._numbers[base] = number
        self._taken.add(name)
        return name
