"""BatchNormalization folds into the Conv, ConvTranspose or Gemm before it.

``y = g * (W x + b - m) / sqrt(v + e) + h`` is ``(g / sqrt(v + e)) W x + (b - m) g / sqrt(v + e) + h``, channel by
channel, so the product runs on one set of weights and the normalization costs nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ..constants import Weight, weight_of
from ..fresh import FreshNames
from ..graph import constant
from ..rewiring import move_output

Array = npt.NDArray[Any]


def fold_batchnorm(graph: gs.Graph, names: FreshNames) -> int:
    """Fold every BatchNormalization that follows a weighted operator with no other reader; return how many."""
    outputs = {id(tensor) for tensor in graph.outputs}
    local = {id(node) for node in graph.nodes}
    count = 0
    for norm in graph.nodes:
        if (
            norm.op != "BatchNormalization"
            or norm.domain
            or norm.attrs.get("training_mode", 0)
            or len(norm.outputs) != 1
        ):
            continue
        source = norm.inputs[0]
        node = source.inputs[0] if len(source.inputs) == 1 else None
        shared = len(source.outputs) != 1 or id(source) in outputs
        if node is not None and not shared and id(node) in local and not norm.attrs.get("training_mode", 0):
            count += _fold(names, node, norm)
    return count


def _fold(names: FreshNames, node: gs.Node, norm: gs.Node) -> bool:
    statistics = [weight_of(t) for t in norm.inputs[1:5]]
    weight = weight_of(node.inputs[1]) if len(node.inputs) > 1 else None
    axis = _out_axis(node)
    if weight is None or axis is None or any(s is None for s in statistics):
        return False
    gain, shift = _affine([s for s in statistics if s is not None], float(norm.attrs.get("epsilon", 1e-5)))
    bias = _bias(node, len(gain))
    if bias is None or weight.shape[axis] != len(gain):
        return False
    _replace(names, node, norm, (weight, axis), (gain, bias * gain + shift))
    return True


def _out_axis(node: gs.Node) -> int | None:
    if node.op == "Conv":
        return 0
    if node.op == "ConvTranspose" and node.attrs.get("group", 1) == 1:
        return 1
    if node.op == "Gemm" and node.attrs.get("alpha", 1.0) == 1.0 and node.attrs.get("beta", 1.0) == 1.0:
        return 0 if node.attrs.get("transB", 0) else 1
    return None


def _affine(statistics: list[Weight], epsilon: float) -> tuple[Array, Array]:
    """Return gain and shift [channels] in float64."""
    scale, offset, mean, variance = (s.values().astype(np.float64) for s in statistics)
    gain = scale / np.sqrt(variance + epsilon)
    return gain, offset - mean * gain


def _bias(node: gs.Node, channels: int) -> Array | None:
    if len(node.inputs) < 3 or node.inputs[2].is_empty():
        return np.zeros(channels)
    bias = weight_of(node.inputs[2])
    if bias is None or bias.shape != (channels,):
        return None
    return bias.values().astype(np.float64)


def _replace(
    names: FreshNames, node: gs.Node, norm: gs.Node, weight: tuple[Weight, int], affine: tuple[Array, Array]
) -> None:
    (view, axis), (gain, bias) = weight, affine
    old = view.values()
    spread = gain.reshape([-1 if i == axis else 1 for i in range(old.ndim)])
    name = node.inputs[1].name
    node.inputs[1] = constant(names(f"{name}_folded"), (old * spread).astype(old.dtype))
    folded_bias = constant(names(f"{name}_folded_bias"), bias.astype(old.dtype))
    if len(node.inputs) < 3:
        node.inputs.append(folded_bias)
    else:
        node.inputs[2] = folded_bias
    move_output(node, norm.outputs[0])
