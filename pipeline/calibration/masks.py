"""Infinities that a model makes on purpose: masks of attention, which add -Inf to the scores that are not to count."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ..constants import is_float, is_sparse
from ..graph import all_graphs, values

LARGEST = 2**24
"""Elements up to which a constant may be a mask; larger ones are weights and not looked at."""
_ENDS = ("Softmax", "LogSoftmax")


def masked_tensors(graph: gs.Graph) -> set[str]:
    """Return the tensors into which a constant of the model carries infinities, up to a Softmax.

    Args:
        graph: Topologically sorted, as files are.
    """
    found: set[str] = set()
    for inner in all_graphs(graph):
        for node in inner.nodes:
            given = [*node.inputs, *node.attrs.values()]
            flows = any(_is_infinite(t) or (isinstance(t, gs.Tensor) and t.name in found) for t in given)
            if flows and node.op not in _ENDS:
                found.update(tensor.name for tensor in node.outputs)
    return found


def _is_infinite(operand: object) -> bool:
    if isinstance(operand, float):
        return bool(np.isinf(operand))
    if not isinstance(operand, gs.Constant) or not is_float(operand) or is_sparse(operand):
        return False
    return int(np.prod(operand.shape)) <= LARGEST and bool(np.isinf(np.asarray(values(operand), np.float32)).any())
