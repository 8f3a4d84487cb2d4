"""Identity and inference-time Dropout vanish: they would stand between an operator and the quantizer behind it."""

from __future__ import annotations

import onnx_graphsurgeon as gs


def remove_identity(graph: gs.Graph) -> int:
    """Bypass Identity and Dropout nodes whose result is no graph output; return how many."""
    count = 0
    for node in list(graph.nodes):
        if node.op not in ("Identity", "Dropout") or not node.inputs or len(_used(graph, node)) > 1:
            continue
        source, output = node.inputs[0], node.outputs[0]
        if any(output is t for t in graph.outputs) or _may_train(node):
            continue
        for reader in list(output.outputs):
            for i, entry in enumerate(reader.inputs):
                if entry is output:
                    reader.inputs[i] = source
        node.outputs.clear()
        count += 1
    graph.cleanup(remove_unused_graph_inputs=False)
    return count


def _used(graph: gs.Graph, node: gs.Node) -> list[gs.Tensor]:
    return [t for t in node.outputs if t.outputs or any(t is o for o in graph.outputs)]


def _may_train(node: gs.Node) -> bool:
    return node.op == "Dropout" and len(node.inputs) > 2 and not node.inputs[2].is_empty()
