"""Insert: carry out a plan. The graph is changed here and nowhere else."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ..forms import FORMS, Workbench
from ..forms.siblings import join_siblings
from ..graph import all_graphs
from ..ordering import sort_nodes
from ..plan import Decision, Plan


def insert(plan: Plan, bench: Workbench) -> gs.Graph:
    """Rewrite ``bench.graph`` as ``plan`` says, up to half precision, and return it, cleaned up and sorted.

    Args:
        plan: What to do at each site.
        bench: The float graph, and the parameters and codes that the plan asks for.
    """
    by_node: dict[str, list[Decision]] = {}
    for decision in plan.decisions:
        if decision.form != "cast" and (decision.spec is not None or decision.form != "qdq"):
            by_node.setdefault(decision.site.node, []).append(decision)
    for scope in list(all_graphs(bench.graph)):
        bench.enter(scope)
        for node in list(scope.nodes):
            decisions = by_node.get(node.name, [])
            form = next((d.form for d in decisions if d.site.role != "bias"), "qdq")
            if decisions:
                FORMS.get(form)(bench, node, decisions)
    join_siblings(bench)
    bench.graph.cleanup(remove_unused_graph_inputs=False)
    sort_nodes(bench.graph)
    return bench.graph
