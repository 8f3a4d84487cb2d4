"""Identity and inference-time Dropout vanish: they would stand between an operator and the quantizer behind it."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ..fresh import FreshNames
from ..graph import values
from ..rewiring import remove, replace_reads


def remove_identity(graph: gs.Graph, names: FreshNames) -> int:
    """Bypass Identity and Dropout nodes whose result is no output of the graph; return how many."""
    del names
    outputs = {id(tensor) for tensor in graph.outputs}
    count = 0
    for node in graph.nodes:
        if node.op not in ("Identity", "Dropout") or node.domain or not node.inputs or _may_train(node):
            continue
        masks = [t for t in node.outputs[1:] if t.outputs or id(t) in outputs]
        if masks or id(node.outputs[0]) in outputs:
            continue
        replace_reads(node.outputs[0], node.inputs[0])
        remove(node)
        count += 1
    return count


def _may_train(node: gs.Node) -> bool:
    if node.op != "Dropout" or len(node.inputs) < 3 or node.inputs[2].is_empty():
        return False
    mode = node.inputs[2]
    return not isinstance(mode, gs.Constant) or bool(values(mode).any())
