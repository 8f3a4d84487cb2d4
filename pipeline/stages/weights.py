"""Weights: the plan's weight sites become codes, one array at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from ...calibrate.errors import ModelError
from ...calibrate.qarray import QArray, Spec, minmax_range, params_from_range, quantize
from ..constants import Weight, weight_of
from ..plan import Decision, Plan, Site


def quantize_weights(graph: gs.Graph, plan: Plan) -> dict[Site, QArray]:
    """Quantize every weight that the plan names; a weight with two users of the same spec is quantized once."""
    cache: dict[tuple[str, Spec], QArray] = {}
    result: dict[Site, QArray] = {}
    for decision, weight in _weights(graph, plan):
        assert decision.spec is not None
        key = (weight.key, decision.spec)
        if key not in cache:
            array = np.asarray(weight.values(), dtype=np.float32)
            ranges = minmax_range(array, decision.spec.granularity)
            cache[key] = quantize(array, params_from_range(ranges, decision.spec))
        result[decision.site] = cache[key]
    return result


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
    nodes = {node.name: node for node in graph.nodes}
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
