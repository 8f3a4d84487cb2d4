"""Weights: the plan's weight sites become codes, one array at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...calibrate.errors import ModelError
from ...calibrate.qarray import QArray, Spec
from ...calibrate.stats.gram import Gram
from ...calibrate.weights import WEIGHT_METHODS, WeightMethod, WeightStats
from ..calibration import Calibration
from ..constants import Weight, weight_of
from ..graph import all_graphs
from ..layouts import Layout, layout_of
from ..plan import Decision, Plan, Site

Array = npt.NDArray[Any]


def quantize_weights(graph: gs.Graph, plan: Plan, calibration: Calibration | None = None) -> dict[Site, QArray]:
    """Quantize every weight that the plan names, one at a time.

    A weight with two users of the same spec is quantized once, unless its algorithm looks at their inputs.

    Args:
        graph: The float graph.
        plan: What was decided; names the algorithm of each weight.
        calibration: Statistics of inputs, for algorithms that need them.

    Raises:
        DataError: An algorithm needs statistics that were not collected.
    """
    nodes = {node.name: node for inner in all_graphs(graph) for node in inner.nodes}
    cache: dict[tuple[str, Spec, str, str], QArray] = {}
    result: dict[Site, QArray] = {}
    for decision, weight in _weights(graph, plan):
        if decision.form == "outlier":  # that form splits the weight itself
            continue
        assert decision.spec is not None
        node = nodes[decision.site.node]
        method = WEIGHT_METHODS.resolve(decision.algorithm)
        source = node.inputs[0].name if method.needs else ""
        key = (weight.key, decision.spec, decision.algorithm, source)
        if key not in cache:
            layout = layout_of(node, weight.shape)
            stats = layer_stats(layout, calibration, node.inputs[0].name)
            cache[key] = quantize_layer(weight.values(), decision.spec, layout, method, stats)
        result[decision.site] = cache[key]
    return result


def quantize_layer(
    w: Array, spec: Spec, layout: Layout, method: WeightMethod, stats: WeightStats | None = None
) -> QArray:
    """Quantize one weight.

    Args:
        w: Weight in the operator's own layout.
        spec: In the axes of that layout.
        layout: The way to [out, in] and back.
        method: The algorithm.
        stats: Statistics of the inputs of [out, in].
    """
    matrix = layout.matrix(np.asarray(w, dtype=np.float32))
    if layout.groups > 1 and method.needs:
        method, stats = WEIGHT_METHODS.get("rtn_mse"), None  # inputs differ from group to group
    return layout.restore(method(matrix, layout.spec(spec), stats), spec)


def layer_stats(layout: Layout, calibration: Calibration | None, tensor: str) -> WeightStats | None:
    """Return what was collected of a layer's input, in the order of the matrix's inputs; None when nothing was."""
    known = None if calibration is None else calibration.tensors.get(tensor)
    if known is None or layout.groups > 1 or (known.channels is None and known.gram is None):
        return None
    columns = layout.columns()
    channels, gram = known.channels, known.gram
    if channels is not None and len(channels.amax) != len(columns):
        return None
    if channels is not None:
        channels = dataclasses.replace(
            channels, amax=channels.amax[columns], total=channels.total[columns], energy=channels.energy[columns]
        )
    if gram is not None:
        gram = Gram(matrix=gram.matrix[np.ix_(columns, columns)], tokens=gram.tokens)
    return WeightStats(gram=gram, channels=channels)


def settle_nonfinite(graph: gs.Graph, plan: Plan, *, skip: bool) -> Plan:
    """Return the plan without the layers whose weights are not finite.

    Args:
        graph: The float graph.
        plan: What was decided without looking at values.
        skip: Leave such layers in float; otherwise the first one is an error.

    Raises:
        ModelError: A weight holds NaN or infinity, and ``skip`` is not set.
    """
    bad: dict[str, str] = {}
    for decision, weight in _weights(graph, plan):
        array = weight.values()
        count = int(array.size - np.isfinite(array.astype(np.float32, copy=False)).sum())
        if count and not skip:
            raise _not_finite(weight, count, array.size)
        if count:
            bad[decision.site.node] = f"{count} values of its weight {weight.constant.name!r} are not finite"
    kept = tuple(
        dataclasses.replace(d, spec=None, form="qdq", reason=bad[d.site.node]) if d.site.node in bad else d
        for d in plan.decisions
    )
    return dataclasses.replace(plan, decisions=kept)


def _weights(graph: gs.Graph, plan: Plan) -> Iterator[tuple[Decision, Weight]]:
    nodes = {node.name: node for inner in all_graphs(graph) for node in inner.nodes}
    for decision in plan.quantized():
        if decision.site.role == "weight":
            weight = weight_of(nodes[decision.site.node].inputs[decision.site.index])
            assert weight is not None
            yield decision, weight


def _not_finite(weight: Weight, count: int, size: int) -> ModelError:
    return ModelError(
        "a weight holds values that are not finite",
        where=f"initializer {weight.constant.name!r}",
        found=f"{count} of {size} values are NaN or infinite",
        expected="finite values",
        do="train or export the model again, or leave the layer in float with --skip-nonfinite",
    )
