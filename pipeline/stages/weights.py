"""Weights: the plan's weight sites become codes, one array at a time."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ...calibrate.errors import ModelError
from ...calibrate.qarray import QArray, minmax_range, params_from_range, quantize
from ..constants import Weight, weight_of
from ..plan import Plan, Site


def quantize_weights(graph: gs.Graph, plan: Plan) -> dict[Site, QArray]:
    """Quantize every weight that the plan names; a weight with two users of the same spec is quantized once.

    Raises:
        ModelError: A weight holds NaN or infinity.
    """
    nodes = {node.name: node for node in graph.nodes}
    cache: dict[tuple[object, ...], QArray] = {}
    result: dict[Site, QArray] = {}
    for decision in plan.quantized():
        if decision.site.role != "weight" or decision.spec is None:
            continue
        weight = weight_of(nodes[decision.site.node].inputs[decision.site.index])
        assert weight is not None
        key = (weight.key, decision.spec)
        if key not in cache:
            array = finite_values(weight)
            cache[key] = quantize(
                array, params_from_range(minmax_range(array, decision.spec.granularity), decision.spec)
            )
        result[decision.site] = cache[key]
    return result


def finite_values(weight: Weight) -> np.ndarray:
    """Return the values of a weight in float32.

    Raises:
        ModelError: Some are NaN or infinite.
    """
    array = np.asarray(weight.values(), dtype=np.float32)
    bad = int(array.size - np.isfinite(array).sum())
    if bad:
        raise ModelError(
            "a weight holds values that are not finite",
            where=f"initializer {weight.constant.name!r}",
            found=f"{bad} of {array.size} values are NaN or infinite",
            expected="finite values",
            do="train or export the model again, or leave the layer alone with --skip-nonfinite",
        )
    return array
