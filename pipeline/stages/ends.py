"""First and last layers of a model, which many leave in float: the first sees raw data, the last makes the answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_graphsurgeon as gs

from ..constants import weight_of
from ..graph import all_graphs
from ..rules import rule_of

REASONS = {
    "first": "kept on request (keep: first): no layer comes before it, all others see the error of its raw input",
    "last": "kept on request (keep: last): no layer comes behind it, its error goes into the answer as it is",
}


def end_layers(graph: gs.Graph, wanted: Iterable[str]) -> dict[str, str]:
    """Return the layers of the main graph that no other layer feeds, or that feed no other, and why to keep them.

    A *layer* multiplies by a constant weight. There are several first ones where a model has several branches, such as
    query, key and value of a Transformer's first block. Bodies of If, Loop and Scan run as a part of their node: it
    counts as a layer when it holds one, and its own layers are none of the ends.

    Args:
        graph: Prepared main graph, topologically sorted.
        wanted: ``"first"``, ``"last"``, both or none.

    Returns:
        Reason by node name.
    """
    found: dict[str, str] = {}
    for end in dict.fromkeys(wanted):
        forward = end == "first"
        reached: set[int] = set()  # tensors with a layer before them, or behind them
        for node in graph.nodes if forward else reversed(graph.nodes):
            sources, results = _read(node), list(node.outputs)
            if not forward:
                sources, results = results, sources
            is_reached = any(id(tensor) in reached for tensor in sources)
            if _is_layer(node) and not is_reached:
                found.setdefault(node.name, REASONS[end])
            if is_reached or _holds_layer(node):
                reached.update(id(tensor) for tensor in results)
    return found


def _bodies(node: gs.Node) -> list[gs.Graph]:
    return [inner for value in node.attrs.values() if isinstance(value, gs.Graph) for inner in all_graphs(value)]


def _read(node: gs.Node) -> Sequence[gs.Tensor]:
    """Return what a node reads, its bodies included."""
    return [*node.inputs, *(tensor for body in _bodies(node) for inner in body.nodes for tensor in inner.inputs)]


def _is_layer(node: gs.Node) -> bool:
    rule = rule_of(node)
    if rule is None or rule.kind != "weighted" or rule.weight is None:
        return False
    return len(node.inputs) > rule.weight and weight_of(node.inputs[rule.weight]) is not None


def _holds_layer(node: gs.Node) -> bool:
    return _is_layer(node) or any(_is_layer(inner) for body in _bodies(node) for inner in body.nodes)
