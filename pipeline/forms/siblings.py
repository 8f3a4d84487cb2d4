"""Join OutlierMatMul nodes that read the same tensor (query, key and value; gate and up) into one, split behind it.

The rows of X are quantized once, and one wide product keeps all cores busy where three narrow ones do not. Nothing
changes in the numbers: the nodes have the same outlier columns and the same limit, for those come from the tensor that
they read, and every output column has a scale of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...plugins.outlier_matmul import op as contract
from ..constants import weight_of
from ..graph import all_graphs
from . import Workbench
from .outlier import onnx_type

_INDEX = contract.INPUTS.index("outlier_index")


def join_siblings(bench: Workbench) -> None:
    """Replace every group of OutlierMatMul nodes that could share their rows by one node and a Split."""
    for scope in list(all_graphs(bench.graph)):
        bench.enter(scope)
        for nodes in list(_groups(scope)):
            _join(bench, nodes)


def _groups(scope: gs.Graph) -> Iterator[list[gs.Node]]:
    """Yield the nodes of one graph that read one tensor in one way, two or more at a time."""
    groups: dict[tuple[object, ...], list[gs.Node]] = {}
    for node in scope.nodes:
        if (node.domain, node.op) != (contract.DOMAIN, contract.OP_TYPE) or len(node.inputs) != len(contract.INPUTS):
            continue
        if any(weight_of(tensor) is None for tensor in node.inputs[1:]):
            continue
        index = _values(node.inputs[_INDEX]).tobytes()
        key = (id(node.inputs[0]), index, node.attrs.get("limit"), node.attrs.get("padding"))
        groups.setdefault(key, []).append(node)
    return (nodes for nodes in groups.values() if len(nodes) > 1)


def _join(bench: Workbench, nodes: list[gs.Node]) -> None:
    first = nodes[0]
    outputs = [node.outputs[0] for node in nodes]
    widths = [len(_values(node.inputs[1])) for node in nodes]
    constants: list[gs.Tensor] = []
    for slot, name in enumerate(contract.INPUTS[1:], start=1):
        parts = [_values(node.inputs[slot]) for node in nodes]
        whole = parts[0] if slot == _INDEX else np.concatenate(parts)
        constants.append(bench.constant(f"{first.name}_joined_{name}", whole, onnx_type(whole)))
    whole_output = bench.variable(f"{first.name}_joined", like=outputs[0])
    if whole_output.shape:
        whole_output.shape[-1] = sum(widths)
    joined = gs.Node(
        op=contract.OP_TYPE,
        name=bench.fresh(f"{first.name}_joined"),
        attrs=dict(first.attrs),
        inputs=[first.inputs[0], *constants],
        outputs=[whole_output, first.outputs[1]],
        domain=contract.DOMAIN,
    )
    for node in nodes:
        node.inputs.clear()
        node.outputs.clear()
    bench.scope.nodes.append(joined)
    sizes = bench.constant(f"{joined.name}_widths", np.array(widths, np.int64), "INT64")
    split = bench.node("Split", f"{joined.name}_Split", [whole_output, sizes], outputs[0], {"axis": -1})
    split.outputs.extend(outputs[1:])


def _values(tensor: gs.Tensor) -> npt.NDArray[np.generic]:
    weight = weight_of(tensor)
    assert weight is not None
    return np.asarray(weight.values())
