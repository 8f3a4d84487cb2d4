"""Cross-layer equalization of a graph: balance the weights along chains of Conv and Gemm before anything is measured.

It looks at weights only and changes what the tensors inside the chains hold, so statistics are collected after it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...calibrate.equalize.cross_layer import cross_layer, magnitudes
from ..constants import weight_of
from ..fresh import FreshNames
from ..graph import constant

Array = npt.NDArray[Any]

CROSS_LAYER = "cross_layer"
"""Its name as a value of ``equalize``."""
LAYERS = ("Conv", "Gemm")
COMMUTING = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity", "Dropout")
"""What a positive factor per channel passes through unchanged."""


def balance(graph: gs.Graph) -> list[tuple[str, ...]]:
    """Equalize all chains of a graph in place; its float function stays what it was.

    Args:
        graph: Prepared float graph.

    Returns:
        Names of the layers of each chain that was changed, first to last.
    """
    done, names = list[tuple[str, ...]](), FreshNames(graph)
    for chain in _chains(graph):
        scales = cross_layer([_magnitudes(node) for node in chain])
        if all(np.allclose(scale, 1.0, rtol=1e-3) for scale in scales):
            continue
        for i, scale in enumerate(scales):
            _divide(chain[i], scale, names)
            _multiply(chain[i + 1], scale, names)
        done.append(tuple(node.name for node in chain))
    return done


def _chains(graph: gs.Graph) -> list[list[gs.Node]]:
    """Return the longest runs of layers each of which is read by the next one only."""
    outputs = {id(output) for output in graph.outputs}
    layers = [node for node in graph.nodes if _is_layer(node)]
    following = {id(node): _next(node, outputs) for node in layers}
    inner = {id(node) for node in following.values() if node is not None}
    chains = []
    for node in layers:
        if id(node) in inner:
            continue
        chain = [node]
        while (behind := following[id(chain[-1])]) is not None:
            chain.append(behind)
        if len(chain) > 1:
            chains.append(chain)
    return chains


def _is_layer(node: gs.Node) -> bool:
    """Whether a node is a layer whose channels can be scaled: constant weight, and a bias that is constant or none."""
    if node.op not in LAYERS or node.domain or node.attrs.get("transA", 0):
        return False
    weight = weight_of(node.inputs[1])
    given = len(node.inputs) > 2 and not node.inputs[2].is_empty()
    bias = weight_of(node.inputs[2]) if given else None
    return weight is not None and (not given or (bias is not None and len(bias.shape) == 1))


def _next(node: gs.Node, outputs: set[int]) -> gs.Node | None:
    """Return the layer that alone reads a layer's output, through what commutes with a factor per channel."""
    here, rows = node, _magnitudes(node).shape[0]
    while len(here.outputs) == 1 and id(here.outputs[0]) not in outputs and len(here.outputs[0].outputs) == 1:
        tensor, here = here.outputs[0], here.outputs[0].outputs[0]
        if here.domain or here.inputs[0] is not tensor:
            return None
        if here.op in LAYERS:
            return here if _is_layer(here) and _magnitudes(here).shape[1] == rows else None
        if here.op not in COMMUTING:
            return None
    return None


def _magnitudes(node: gs.Node) -> Array:
    weight = weight_of(node.inputs[1])
    assert weight is not None
    w = np.asarray(weight.values(), np.float32)
    if node.op == "Gemm":
        return magnitudes(w if node.attrs.get("transB", 0) else w.T)
    return magnitudes(w, int(node.attrs.get("group", 1)))


def _divide(node: gs.Node, scale: Array, names: FreshNames) -> None:
    """Divide the output channels of a layer by ``scale`` [out]."""
    axis = 1 if node.op == "Gemm" and not node.attrs.get("transB", 0) else 0
    weight = weight_of(node.inputs[1])
    assert weight is not None
    rank = len(weight.shape)
    _replace(node, 1, 1 / scale.reshape([-1 if i == axis else 1 for i in range(rank)]), names)
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        _replace(node, 2, 1 / scale, names)


def _multiply(node: gs.Node, scale: Array, names: FreshNames) -> None:
    """Multiply the input channels of a layer by ``scale`` [in]."""
    if node.op == "Gemm":
        _replace(node, 1, scale if node.attrs.get("transB", 0) else scale[:, None], names)
        return
    weight, groups = weight_of(node.inputs[1]), int(node.attrs.get("group", 1))
    assert weight is not None
    shape = weight.shape
    by_row = np.repeat(scale.reshape(groups, -1), shape[0] // groups, axis=0)
    _replace(node, 1, by_row.reshape(shape[0], shape[1], *(1,) * (len(shape) - 2)), names)


def _replace(node: gs.Node, slot: int, factor: Array, names: FreshNames) -> None:
    old = weight_of(node.inputs[slot])
    assert old is not None
    values = old.values()
    product = (np.asarray(values, np.float32) * factor).astype(values.dtype)
    node.inputs[slot] = constant(names(f"{node.inputs[slot].name}_equalized"), product)
