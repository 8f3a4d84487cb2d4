"""What a model does on purpose: masks of attention add -Inf to the scores that are not to count.

A row that is masked as a whole is NaN behind its Softmax; models that reckon with that ask for IsNaN and replace it.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ..constants import is_float, is_sparse
from ..graph import all_graphs, values

LARGEST = 2**24
"""Elements up to which a constant may be a mask; larger ones are weights and not looked at."""
_ENDS = ("Softmax", "LogSoftmax")


def masked_tensors(graph: gs.Graph) -> tuple[set[str], set[str]]:
    """Return the tensors into which the model itself carries infinities, and those in which it reckons with NaN.

    Args:
        graph: Topologically sorted, as files are.
    """
    found: set[str] = set()
    replaced: set[str] = set()
    for inner in all_graphs(graph):
        for node in inner.nodes:
            given = [*node.inputs, *node.attrs.values()]
            flows = any(_is_infinite(t) or (isinstance(t, gs.Tensor) and t.name in found) for t in given)
            if flows and node.op not in _ENDS:
                found.update(tensor.name for tensor in node.outputs)
            elif flows and any(reader.op == "IsNaN" for reader in node.outputs[0].outputs):
                replaced.add(node.outputs[0].name)
    return found, replaced


def _is_infinite(operand: object) -> bool:
    if isinstance(operand, float):
        return bool(np.isinf(operand))
    if not isinstance(operand, gs.Constant) or not is_float(operand) or is_sparse(operand):
        return False
    return int(np.prod(operand.shape)) <= LARGEST and bool(np.isinf(np.asarray(values(operand), np.float32)).any())
