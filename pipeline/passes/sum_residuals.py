"""The sum before a LayerNormalization is written as Sum, which ONNX Runtime's CPU provider does not fuse.

It turns ``Add -> LayerNormalization`` into SkipLayerNormalization, whose CPU kernel takes several times as long as the
two operators that it replaces. ``Sum`` of two tensors is the same operation as ``Add``, and stays apart.
`tests/bench/fusion.py` measures it.

Source: ONNX operators Add, Sum; ONNX Runtime 1.31, SkipLayerNormFusion and the profile of its CPU provider.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ..constants import dtype_name, weight_of
from ..fresh import FreshNames


def sum_residuals(graph: gs.Graph, names: FreshNames) -> int:
    """Sums before normalizations stay apart from them: the fused kernel is slower than the two; return how many."""
    del names
    outputs = {id(tensor) for tensor in graph.outputs}
    count = 0
    for norm in graph.nodes:
        if norm.op != "LayerNormalization" or norm.domain:
            continue
        total = norm.inputs[0]
        node = total.inputs[0] if len(total.inputs) == 1 else None
        if node is None or id(total) in outputs or len(total.outputs) != 1 or not _is_residual(node):
            continue
        vars(node).pop("origin", None)
        node.op = "Sum"
        count += 1
    return count


def _is_residual(node: gs.Node) -> bool:
    """Whether a node adds two float32 activations; an Add of a bias belongs to the product before it."""
    if node.op != "Add" or node.domain:
        return False
    return all(dtype_name(t) == "float32" and weight_of(t) is None for t in node.inputs)
