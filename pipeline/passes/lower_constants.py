"""Constant nodes become initializers, so that a weight is found the same way whoever exported the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from ..fresh import FreshNames
from ..rewiring import remove, replace_reads

_PLAIN = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}


def lower_constants(graph: gs.Graph, names: FreshNames) -> int:
    """Replace Constant nodes that hold numbers by constants of the same name; return how many.

    One whose result is an output of the graph stays: only a node can give an output its name.
    """
    del names
    outputs = {id(tensor) for tensor in graph.outputs}
    count = 0
    for node in graph.nodes:
        held = _values(node) if node.op == "Constant" and id(node.outputs[0]) not in outputs else None
        if held is not None:
            replace_reads(node.outputs[0], gs.Constant(node.outputs[0].name, held))
            remove(node)
            count += 1
    return count


def _values(node: gs.Node) -> Any:
    value = node.attrs.get("value")
    if isinstance(value, gs.Constant):
        return value._values
    return next((np.asarray(node.attrs[name], dtype) for name, dtype in _PLAIN.items() if name in node.attrs), None)
