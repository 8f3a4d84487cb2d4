"""Insert: carry out a plan. The graph is changed here and nowhere else."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ..forms import FORMS, Workbench
from ..plan import Decision, Plan


def insert(plan: Plan, bench: Workbench) -> gs.Graph:
    """Rewrite ``bench.graph`` as ``plan`` says and return it, cleaned up and sorted.

    Args:
        plan: What to do at each site.
        bench: The float graph, and the parameters and codes that the plan asks for.
    """
    by_node: dict[str, list[Decision]] = {}
    for decision in plan.decisions:
        if decision.spec is not None or decision.form != "qdq":
            by_node.setdefault(decision.site.node, []).append(decision)
    nodes = {node.name: node for node in bench.graph.nodes}
    for name, decisions in by_node.items():
        form = next((d.form for d in decisions if d.site.role != "bias"), "qdq")
        FORMS.get(form)(bench, nodes[name], decisions)
    bench.graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return bench.graph
