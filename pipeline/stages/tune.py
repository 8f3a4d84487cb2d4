"""Tune: what a target runs faster in another writing is rewritten, after the plan was carried out."""

from __future__ import annotations

import inspect

from ..fresh import FreshNames
from ..graph import Model, all_graphs
from ..ordering import sort_nodes
from ..passes import TARGET_PASSES
from ..targets import TARGETS


def tune(model: Model, target: str) -> dict[str, int]:
    """Run the passes that a target declares; ``model`` is changed in place, what it computes is not.

    Returns:
        Name of each pass that found something -> how many places it changed.
    """
    wanted, counts = TARGETS.get(target).passes, dict[str, int]()
    names = FreshNames(model.graph)
    for name, run in TARGET_PASSES.items():
        if name in wanted:
            found = sum(run(graph, names) for graph in list(all_graphs(model.graph)))
            counts.update({name: found} if found else {})
    if counts:
        model.graph.cleanup(remove_unused_graph_inputs=False)
        sort_nodes(model.graph)
    return counts


def describe_passes(counts: dict[str, int]) -> list[str]:
    """Return a line per pass: its name, how often, and why."""
    lines = []
    for name, count in counts.items():
        why = (inspect.getdoc(TARGET_PASSES[name]) or "").splitlines()[0].rpartition("; return")[0]
        lines.append(f"{name} ({count}): {why}")
    return lines
