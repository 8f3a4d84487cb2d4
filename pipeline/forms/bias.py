"""Biases of products of codes: int32 with scale ``s_x * s_w``, as integer kernels add them to their sums.

A bias that int32 cannot hold at that scale must not stay where it is, in float, either: ONNX Runtime stores it as int32
all the same (its optimizer WeightBiasQuantization), and it wraps around. It moves behind the product, into an Add.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...calibrate.qarray import QParams
from ..constants import weight_of
from ..plan import Decision
from . import Workbench

Array = npt.NDArray[Any]

SLOT = 2
"""Where Conv, ConvTranspose and Gemm take their bias."""
LARGEST = 2**31 - 1


def int32_bias(bias: Array, data: QParams, weight: QParams) -> tuple[Array, Array] | None:
    """Return a bias [out] as int32 codes [out], and their scales [out] or [1]; None when int32 cannot hold it.

    Args:
        bias: Real values.
        data: Of the input, one scale.
        weight: Of the weight, one scale or one per output channel.
    """
    product, info = (data.scale.astype(np.float64) * weight.scale).reshape(-1), np.finfo(np.float32)
    if product.min(initial=np.inf) < info.tiny or product.max(initial=0) > info.max:
        return None
    scale = product.astype(np.float32)
    codes = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
    # Written so that NaN does not fit either.
    return (codes.astype(np.int32), scale) if (np.abs(codes) < LARGEST).all() else None


def settle_bias(bench: Workbench, node: gs.Node, decisions: list[Decision]) -> bool:
    """Store the bias of a product of integers as its decision says; return whether it may stay where it is.

    To be called while the weight of ``node`` is still what it was in the float graph.
    """
    by_role = {d.site.role: d for d in decisions}
    data, weight = by_role.get("activation"), by_role.get("weight")
    if data is None or weight is None or data.spec is None or weight.spec is None or len(node.inputs) <= SLOT:
        return True
    found, product = weight_of(node.inputs[SLOT]), weight_of(node.inputs[weight.site.index])
    if found is None or product is None or found.shape[:-1] != (1,) * (len(found.shape) - 1):
        return True
    real, granularity = np.asarray(found.values(), dtype=np.float64).reshape(-1), weight.spec.granularity
    channels = product.shape[granularity.axis] if granularity.axis is not None else None
    integers = data.spec.format.is_integer and weight.spec.format.is_integer and not granularity.block_size
    if not integers or channels not in (None, len(real)):
        return True  # No codes, a broadcast bias, or one scale for several channels (groups of a ConvTranspose).
    stored = int32_bias(real, bench.activations[data.site.tensor, data.spec], bench.weights[weight.site].params)
    if stored is not None and "bias" in by_role and by_role["bias"].form == "int32":
        _dequantize(bench, node, *stored)
    return stored is not None


def _dequantize(bench: Workbench, node: gs.Node, codes: Array, scale: Array) -> None:
    bias, attrs = node.inputs[SLOT], {"axis": 0} if len(scale) == len(codes) else {}
    result = bench.variable(f"{bias.name}_DequantizeLinear_Output", bias)
    result.shape = list(codes.shape)
    integers = bench.constant(f"{bias.name}_quantized", codes, "INT32")
    scales = bench.constant(f"{bias.name}_scale", scale if attrs else scale.reshape(()), "FLOAT")
    bench.node("DequantizeLinear", f"{bias.name}_DequantizeLinear", [integers, scales], result, attrs)
    node.inputs[SLOT] = result


def move_bias_behind(bench: Workbench, node: gs.Node, rank: int) -> None:
    """Take the bias out of a product and add it behind.

    Args:
        bench: The graph under work.
        node: Conv, ConvTranspose or Gemm with a constant bias.
        rank: Of its weight.
    """
    found = weight_of(node.inputs[SLOT])
    assert found is not None
    name, output = node.inputs[SLOT].name, node.outputs[0]
    real = np.asarray(found.values(), dtype=np.float32).reshape(-1, *(1,) * (rank - 2))
    bias = bench.constant(f"{name}_behind", real, "FLOAT")
    product = bench.variable(f"{node.name}_without_bias", output)
    node.inputs = list(node.inputs[:SLOT])
    node.outputs = [product]
    bench.node("Add", f"{node.name}_bias_add", [product, bias], output)
    bench.notes.append(
        f"the bias of {node.name!r} is added behind it, in float: int32 with scale s_x * s_w cannot hold it, "
        "and ONNX Runtime would try; the integer kernel is lost there"
    )
