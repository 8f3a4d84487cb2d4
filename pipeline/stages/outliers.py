"""Which input columns of a layer stay in floating point, and whether the layer is worth it."""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from ...plugins.outlier_matmul.op import X_TYPES, Selection, select_outliers
from ..calibration import Calibration
from ..constants import Weight, dtype_name, weight_of
from ..recipe import OutlierOptions

STATIC_FROM = 64
"""Inputs from which ONNX Runtime's int8 with static scales is faster than its float on a CPU, as
``tests/bench/outlier_matmul.py --break-even`` measures."""


def unable(node: gs.Node, weight: Weight, options: OutlierOptions, calibration: Calibration | None) -> str:
    """Return why a node cannot become, or would not gain as, an OutlierMatMul; ``""`` when it can.

    Args:
        node: The node.
        weight: Its weight.
        options: Criterion, cap and least number of inputs.
        calibration: Statistics, for the reason why static scales are not taken either.
    """
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
    if _depth(node, weight) >= options.min_inputs:
        return ""
    static = _unfit_for_static(node, weight, options, calibration)
    return (
        f"only {_depth(node, weight)} inputs: quantizing its rows would cost more than int8 gains (from "
        f"{options.min_inputs} on), and {static or 'the target runs no static scales (w8a8)'}"
    )


def gains_by_static(node: gs.Node, options: OutlierOptions, calibration: Calibration | None) -> bool:
    """Whether a layer has too few inputs for an OutlierMatMul, and no outliers, so that static scales (w8a8) do."""
    weight = weight_of(node.inputs[1]) if node.op in ("MatMul", "Gemm") and len(node.inputs) > 1 else None
    if weight is None or len(weight.shape) != 2 or _depth(node, weight) >= options.min_inputs:
        return False
    return not _unfit_for_static(node, weight, options, calibration)


def _unfit_for_static(node: gs.Node, weight: Weight, options: OutlierOptions, calibration: Calibration | None) -> str:
    if _depth(node, weight) < STATIC_FROM:
        return f"static scales (w8a8) gain nothing below {STATIC_FROM}"
    if not options.looks_at_data:
        return "static scales (w8a8) need data"
    chosen = choose(node.inputs[0].name, calibration, options, least=0)
    if isinstance(chosen, str):
        return f"for static scales (w8a8) there are {chosen}"
    found = len(chosen.index) + chosen.capped
    return f"a static scale (w8a8) would have to hold {found} outlier columns" if found else ""


def _depth(node: gs.Node, weight: Weight) -> int:
    return weight.shape[1 if node.op == "Gemm" and node.attrs.get("transB", 0) else 0]


def choose(tensor: str, calibration: Calibration | None, options: OutlierOptions, least: int = 1) -> Selection | str:
    """Return the outlier columns of a layer's input, or why they cannot be known.

    Args:
        tensor: Name of the layer's input.
        calibration: Statistics with magnitudes per channel.
        options: Criterion and cap.
        least: Columns to choose even where none meets the criterion: the function body runs everywhere with one.
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
        least=least,
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
