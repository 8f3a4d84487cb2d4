"""Statistics that follow from others: of tensors that only move values, and of constants."""

from __future__ import annotations

import dataclasses
from collections import Counter

import onnx_graphsurgeon as gs

from ..calibrate.stats.histogram import Histogram
from .calibration import Calibration, TensorStats
from .calibration.moved import MOVES
from .constants import weight_of
from .graph import all_graphs
from .plan import Plan


def with_moved(graph: gs.Graph, calibration: Calibration) -> Calibration:
    """Return ``calibration`` with tensors that it lacks and that hold the values of one it has, in another layout.

    Passes make such tensors, and collecting ran the file as it was before them. A name that two bodies use for
    tensors of their own is left out.
    """
    found = dict(calibration.tensors)
    nodes = [node for inner in all_graphs(graph) for node in inner.nodes]
    writers = Counter(tensor.name for node in nodes for tensor in node.outputs)
    for node in nodes:
        if node.op not in MOVES or node.domain or not node.inputs or node.inputs[0].name not in found:
            continue
        if writers[node.outputs[0].name] == 1:
            found.setdefault(node.outputs[0].name, TensorStats(histogram=found[node.inputs[0].name].histogram))
    return dataclasses.replace(calibration, tensors=found)


def with_constants(graph: gs.Graph, plan: Plan, calibration: Calibration) -> Calibration:
    """Return ``calibration`` with the constants that a plan stores like activations, counted from their values."""
    wanted = {(d.site.node, d.site.index) for d in plan.quantized() if d.site.role == "activation"}
    found = dict(calibration.tensors)
    for node in (node for inner in all_graphs(graph) for node in inner.nodes):
        for index, tensor in enumerate(node.inputs):
            if (node.name, index) in wanted and tensor.name not in found and (weight := weight_of(tensor)) is not None:
                found[tensor.name] = TensorStats(histogram=Histogram.of(weight.values()))
    return dataclasses.replace(calibration, tensors=found)
