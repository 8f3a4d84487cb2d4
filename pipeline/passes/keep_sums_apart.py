"""The sum before a LayerNormalization is kept from being fused with it by ONNX Runtime's CPU provider.

It turns ``Add -> LayerNormalization`` into SkipLayerNormalization, whose CPU kernel takes several times as long as the
two operators that it replaces, but only where scale and bias have the shape ``[H]``. With the shape ``[1, H]``, which
the operator takes as well, both stay what they are. `tests/bench/fusion.py` measures it.

Source: ONNX operator LayerNormalization (scale and bias broadcast to the input); ONNX Runtime 1.31,
SkipLayerNormFusion and the profile of its CPU provider.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ..constants import dtype_name, weight_of
from ..fresh import FreshNames
from ..graph import constant

_PARAMETERS = (1, 2)
"""Slots of scale and bias."""


def keep_sums_apart(graph: gs.Graph, names: FreshNames) -> int:
    """Sums before normalizations stay apart from them: the fused kernel is slower than the two; return how many."""
    outputs = {id(tensor) for tensor in graph.outputs}
    count = 0
    for norm in graph.nodes:
        if norm.op != "LayerNormalization" or norm.domain or not _has_rows(norm):
            continue
        total = norm.inputs[0]
        node = total.inputs[0] if len(total.inputs) == 1 else None
        if node is None or id(total) in outputs or len(total.outputs) != 1 or not _is_residual(node):
            continue
        for slot in _PARAMETERS[: len(norm.inputs) - 1]:
            weight = weight_of(norm.inputs[slot])
            if weight is not None:
                row = np.asarray(weight.values()).reshape(1, -1)
                norm.inputs[slot] = constant(names(f"{norm.inputs[slot].name}_row"), row)
        count += 1
    return count


def _has_rows(norm: gs.Node) -> bool:
    """Whether scale and bias are constants of one axis, and the input has more."""
    given = [t for t in norm.inputs[1:3] if not t.is_empty()]
    shape = norm.inputs[0].shape
    weights = [weight_of(tensor) for tensor in given]
    return shape is not None and len(shape) > 1 and all(w is not None and len(w.shape) == 1 for w in weights)


def _is_residual(node: gs.Node) -> bool:
    """Whether a node adds two float32 activations; an Add of a bias belongs to the product before it."""
    if node.op != "Add" or node.domain:
        return False
    return all(dtype_name(t) == "float32" and weight_of(t) is None for t in node.inputs)
