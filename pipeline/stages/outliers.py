"""Which input columns of a layer stay in floating point, and whether the layer is worth it."""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from ...plugins.outlier_matmul.op import X_TYPES, Selection, select_outliers
from ..calibration import Calibration
from ..constants import Weight, dtype_name, weight_of
from ..recipe import OutlierOptions


def unable(node: gs.Node, weight: Weight, options: OutlierOptions) -> str:
    """Return why a node cannot become, or would not gain as, an OutlierMatMul; ``""`` when it can."""
    if node.op not in ("MatMul", "Gemm") or len(weight.shape) != 2:
        return "OutlierMatMul replaces MatMul and Gemm with a weight of two dimensions only"
    attributes = [float(node.attrs.get(name, 1.0)) != 1.0 for name in ("alpha", "beta")]
    if node.op == "Gemm" and (any(attributes) or node.attrs.get("transA", 0)):
        return "a Gemm that scales or transposes its input has no OutlierMatMul form"
    if node.op == "Gemm" and len(node.inputs) > 2 and not node.inputs[2].is_empty():
        bias = weight_of(node.inputs[2])
        outputs = weight.shape[0] if node.attrs.get("transB", 0) else weight.shape[1]
        if bias is None or bias.shape not in ((outputs,), (1, outputs)):
            return "its bias is no constant vector with one value per output"
    if dtype_name(node.inputs[0]) not in {t.name for t in X_TYPES}:
        return f"OutlierMatMul takes no {dtype_name(node.inputs[0])} activations"
    depth = weight.shape[1] if node.op == "Gemm" and node.attrs.get("transB", 0) else weight.shape[0]
    if depth < options.min_inputs:
        return (
            f"only {depth} inputs: quantizing its rows would cost more than int8 gains (from {options.min_inputs} on)"
        )
    return ""


def choose(tensor: str, calibration: Calibration | None, options: OutlierOptions) -> Selection | str:
    """Return the outlier columns of a layer's input, or why they cannot be known.

    Args:
        tensor: Name of the layer's input.
        calibration: Statistics with magnitudes per channel.
        options: Criterion and cap.
    """
    if not options.looks_at_data:
        return Selection(index=np.zeros(0, np.int32), energy_share=0.0, bound=math.inf, capped=0, limit=0.0)
    known = None if calibration is None else calibration.tensors.get(tensor)
    if known is None:
        return f"no statistics of {tensor!r}: it was not collected"
    if known.channels is None:
        return f"no magnitudes per channel of {tensor!r} (qpipe calibrate --detail channels)"
    return select_outliers(
        known.channels.amax,
        None if options.absolute else known.channels.mean,
        threshold=options.threshold,
        absolute=options.absolute,
        cap=options.cap,
        least=1,
    )


def describe(selection: Selection) -> str:
    """Return the choice as the reason that the plan prints."""
    count = len(selection.index)
    if math.isinf(selection.bound):
        return "int8 with one scale per row of its input, found at run time, and one per column of its weight"
    more = f", {selection.capped} more beyond the cap" if selection.capped else ""
    return (
        f"int8 rows and columns; {count} outlier columns in float hold {selection.energy_share:.0%} of the energy{more}"
    )
