"""Constant nodes become initializers, so that a weight is found the same way whoever exported the model."""

from __future__ import annotations

import onnx_graphsurgeon as gs


def lower_constants(graph: gs.Graph) -> int:
    """Replace Constant nodes that hold a tensor by constants; return how many."""
    count = 0
    for node in [n for n in graph.nodes if n.op == "Constant" and isinstance(n.attrs.get("value"), gs.Constant)]:
        output, held = node.outputs[0], node.attrs["value"]
        if any(output is t for t in graph.outputs):
            continue
        replacement = gs.Constant(output.name, held._values)
        for reader in list(output.outputs):
            for i, entry in enumerate(reader.inputs):
                if entry is output:
                    reader.inputs[i] = replacement
        node.outputs.clear()
        count += 1
    graph.cleanup(remove_unused_graph_inputs=False)
    return count
