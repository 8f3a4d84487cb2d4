"""Hand out how many new outliers each OutlierMatMul met, as one output of the model."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ...plugins.outlier_matmul import op as contract
from . import Workbench

OUTPUT = "new_outliers"


def expose_counters(bench: Workbench) -> list[str]:
    """Add an output int64 [layers] to the graph: elements beyond the calibrated amplitude that each layer met in a run.

    Layers that look for none (``headroom: 0``) and those in bodies of If, Loop and Scan are not in it.

    Args:
        bench: The graph after `stages.insert`.

    Returns:
        Names of the layers, in the order of the output's elements; without any there is no output either.
    """
    bench.enter(bench.graph)
    nodes = [node for node in bench.graph.nodes if _counts(node)]
    if not nodes:
        bench.notes.append("no layer of the main graph counts new outliers: the model has no output of them")
        return []
    axes = bench.constant(f"{OUTPUT}_axes", np.zeros(1, np.int64), "INT64")
    parts: list[gs.Tensor] = [bench.variable(f"{node.outputs[1].name}_element") for node in nodes]
    for node, part in zip(nodes, parts, strict=True):
        bench.node("Unsqueeze", f"{part.name}_Unsqueeze", [node.outputs[1], axes], part)
    counts = gs.Variable(bench.fresh(OUTPUT), dtype=np.int64, shape=[len(nodes)])
    bench.node("Concat", f"{OUTPUT}_Concat", parts, counts, {"axis": 0})
    bench.graph.outputs.append(counts)
    return [node.name for node in nodes]


def _counts(node: gs.Node) -> bool:
    is_ours = (node.domain, node.op) == (contract.DOMAIN, contract.OP_TYPE)
    return is_ours and len(node.outputs) > 1 and float(node.attrs.get("limit", 0.0)) > 0
