"""Rules about pairs: what stands before and after a Q or DQ node."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from . import rule
from .context import DEQUANTIZE, QUANTIZE, Array, Context, Problem, Site

MOVES = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "MaxPool", "Slice", "Gather", "Concat"})
"""Operators that move values and compute none, so that codes can pass through them."""

BIASED = frozenset({"Conv", "ConvTranspose", "Gemm"})

ONE_ULP = 2.0**-23


@rule("quantize-unread", "error", do="remove the node, or put a DequantizeLinear behind it")
def quantize_unread(context: Context) -> Iterator[Problem]:
    """Somebody reads the codes of a QuantizeLinear."""
    for site in context.sites:
        if site.is_quantize and not site.y.outputs and not context.is_output(site.y):
            yield site.problem("codes that nothing reads", "a DequantizeLinear", site.y)


@rule("quantize-without-dequantize", "warning", do="put a DequantizeLinear between the codes and their readers")
def quantize_without_dequantize(context: Context) -> Iterator[Problem]:
    """Codes reach a DequantizeLinear or an operator on integers; anything else computes with the bare codes.

    Codes that leave the graph as an output are reported too: whoever reads them has to know scale and zero point.
    """
    for site in context.sites:
        if not site.is_quantize:
            continue
        if context.is_output(site.y):
            yield site.problem("codes that are a graph output", "a DequantizeLinear before the output", site.y)
        for node in _float_readers(site.y):
            yield site.problem(f"codes read by {node.op} {node.name}", "a DequantizeLinear before it", site.y)


@rule("pair-parameters", "warning", do="give both nodes the same scale and zero point")
def pair_parameters(context: Context) -> Iterator[Problem]:
    """A DequantizeLinear undoes its QuantizeLinear: same scale, same zero point, same axis."""
    for site in context.sites:
        before = None if site.is_quantize else context.producer(site.x, QUANTIZE)
        if before is not None and not _same_parameters(before, site):
            found = f"{_text(before)} before, {_text(site)} after"
            yield site.problem(found, "the same on both sides")


@rule("quantized-twice", "warning", do="start from the float model")
def quantized_twice(context: Context) -> Iterator[Problem]:
    """A tensor is not rounded twice to the same type with two different scales: that costs accuracy for nothing."""
    for site in context.sites:
        before = context.producer(site.x, DEQUANTIZE) if site.is_quantize else None
        if before is not None and before.codes_type == site.codes_type and not _same_parameters(before, site):
            yield site.problem(f"{_text(before)}, then {_text(site)}", "one rounding per tensor")


@rule("shared-scale", "error", do="quantize again for this target")
def shared_scale(context: Context) -> Iterator[Problem]:
    """For fixed-point targets, operators that only move values have one scale on all sides.

    Such a target passes the codes through as they are; with another scale behind, every value would change.
    """
    if context.target is None or not context.target.shared_scales:
        return
    for scope in context.scopes:
        for node in scope.graph.nodes:
            if node.op in MOVES and node.outputs:
                yield from _moved(context, node)


@rule("bias-scale", "error", do="use input scale times weight scale, and 0 as zero point")
def bias_scale(context: Context) -> Iterator[Problem]:
    """An int32 bias has the scale ``s_x * s_w``, within one unit in the last place of float32.

    Integer kernels add the bias to sums of products of codes, whatever the file says about its scale.
    Source: ONNX QLinearConv, input B: "scale equal to x_scale * w_scale and zero_point = 0".
    """
    for scope in context.scopes:
        for node in scope.graph.nodes:
            if node.op in BIASED and len(node.inputs) > 2 and _plain_sum(node):
                x, w, b = (context.producer(tensor, DEQUANTIZE) for tensor in node.inputs[:3])
                if x and w and b and b.codes_type == "INT32":
                    yield from _bias(x, w, b)


def _float_readers(tensor: gs.Tensor) -> Iterator[gs.Node]:
    for node in tensor.outputs:
        if node.op in MOVES:
            yield from (reader for output in node.outputs for reader in _float_readers(output))
        elif not _takes_codes(node):
            yield node


def _takes_codes(node: gs.Node) -> bool:
    # An operator of another domain states its own contract.
    standard = (node.domain or "") in ("", "ai.onnx")
    integer = node.op.startswith("QLinear") or node.op.endswith("Integer")
    return not standard or integer or node.op in (DEQUANTIZE, "Cast", "Identity", "If", "Loop", "Scan")


def _moved(context: Context, node: gs.Node) -> Iterator[Problem]:
    after = [site for output in node.outputs for site in context.consumers(output, QUANTIZE)]
    before = [site for tensor in node.inputs if (site := context.producer(tensor, DEQUANTIZE))]
    for source in before:
        for site in after:
            if not _same_parameters(source, site):
                yield site.problem(f"{_text(source)} before {node.op}, {_text(site)} behind", "one scale on all sides")


def _plain_sum(node: gs.Node) -> bool:
    return all(float(node.attrs.get(name, 1.0)) == 1.0 for name in ("alpha", "beta"))


def _bias(x: Site, w: Site, b: Site) -> Iterator[Problem]:
    if x.scales is None or w.scales is None or b.scales is None or x.scales.size != 1:
        return
    wanted = x.scales.astype(np.float64).reshape(-1)[0] * w.scales.astype(np.float64).reshape(-1)
    found = b.scales.astype(np.float64).reshape(-1)
    if found.size not in (1, wanted.size) and wanted.size != 1:
        yield b.problem(f"{found.size} scales", f"{wanted.size}, as the weight has", b.scale)
        return
    if not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        return  # another rule's finding
    off = np.abs(found - wanted) > ONE_ULP * np.abs(wanted)
    if off.any():
        at = int(np.flatnonzero(off)[0])
        pair = np.broadcast_arrays(found, wanted)
        yield b.problem(f"scale {pair[0][at]:.9g} at {at}", f"{pair[1][at]:.9g} = s_x * s_w", b.scale)


def _same_parameters(a: Site, b: Site) -> bool:
    """Whether two nodes mean the same by the same codes; unknown counts as same."""
    same_axis = a.per_tensor or b.per_tensor or a.axis == b.axis or a.shape is None or _axes_agree(a, b)
    return same_axis and _same(a.scales, b.scales, a.scale is b.scale) and _same_zero(a, b)


def _axes_agree(a: Site, b: Site) -> bool:
    rank = len(a.shape or ())
    return a.axis % rank == b.axis % rank if rank else True


def _same(a: Array | None, b: Array | None, same_tensor: bool) -> bool:
    if same_tensor or a is None or b is None:
        return True
    return a.size == b.size and bool(np.array_equal(a.reshape(-1), b.reshape(-1)))


def _same_zero(a: Site, b: Site) -> bool:
    known = [site.zeros is not None or site.zero_point is None for site in (a, b)]
    if not all(known) or a.zero_point is b.zero_point:
        return True
    one, other = (np.zeros(1) if site.zeros is None else site.zeros.astype(np.float64).reshape(-1) for site in (a, b))
    return bool(np.all(one == other)) if one.size == other.size or 1 in (one.size, other.size) else False


def _text(site: Site) -> str:
    scale = "scale ?" if site.scales is None else f"scale {float(site.scales.reshape(-1)[0]):g}"
    count = f" (and {site.scales.size - 1} more)" if site.scales is not None and site.scales.size > 1 else ""
    zero = "" if site.zeros is None else f", zero point {site.zeros.astype(np.float64).reshape(-1)[0]:g}"
    return f"{site.codes_type} {scale}{count}{zero}"
