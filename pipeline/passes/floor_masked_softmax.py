"""The input of a masked Softmax gets a floor, so that what is masked becomes small but normal numbers.

ONNX Runtime's CPU kernel gives masked scores ``exp(-88.4) = 4e-39`` each: denormal numbers, which x86 CPUs multiply a
hundred times slower than others, in the Softmax and in the product behind it. With ``x' = max(x, max(x) - 60)`` per row
they become ``exp(-60) = 9e-27``.

The result is the same in float32: the largest score of a row contributes 1 to the sum of exponentials, so a
probability ``p`` of a row of ``n`` scores becomes ``p'`` with ``|p' - p| <= n exp(-60)``, which is below ``2^-48`` for
every ``n`` up to 10^11. Rows that are masked as a whole stay as they are: their largest score is the mask itself.

It costs two more passes over the scores, which a batch without padding pays for nothing, and saves several times that
where scores are masked: in padded batches, and always in causal attention.

Source: ONNX Runtime 1.31, MlasComputeSoftmax (lower range of its exponential); `tests/bench/fusion.py` measures it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from ..constants import dtype_name, weight_of
from ..fresh import FreshNames
from ..graph import constant

FLOOR = 60.0
"""Distance from a row's largest score from which on scores are equal to the mask."""
LOWEST_NORMAL_EXPONENT = -80.0
"""Constants from here downwards make denormal probabilities."""
_LARGEST_MASK = 2**22
"""Values of a constant that are looked at."""
_NEAREST = 64
"""Nodes before a Softmax among which its mask is looked for."""
_COMPUTE = frozenset({"MatMul", "Gemm", "Conv", "Softmax", "LayerNormalization", "DequantizeLinear", "Gather"})
_AXES_AS_INPUT = 18


def floor_masked_softmax(graph: gs.Graph, names: FreshNames) -> int:
    """Masked scores get a floor below the row's largest: no denormal numbers, same result; return how many."""
    count = 0
    for node in list(graph.nodes):
        if node.op == "Softmax" and not node.domain and _over_last_axis(node, int(graph.opset)) and _is_masked(node):
            _floor(graph, names, node)
            count += 1
    return count


def _over_last_axis(node: gs.Node, opset: int) -> bool:
    axis, shape = node.attrs.get("axis", -1 if opset >= 13 else 1), node.inputs[0].shape
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def _is_masked(node: gs.Node) -> bool:
    scores = node.inputs[0]
    source = scores.inputs[0] if len(scores.inputs) == 1 else None
    if source is None or source.domain or dtype_name(scores) != "float32":
        return False
    if source.op == "Where":
        return any(_holds_mask(tensor) for tensor in source.inputs[1:])
    return source.op == "Add" and any(_holds_mask(tensor) or _comes_from_mask(tensor) for tensor in source.inputs)


def _comes_from_mask(tensor: gs.Tensor) -> bool:
    """Whether a tensor is computed, without any product of matrices, from a constant that masks, or is an input."""
    if dtype_name(tensor) != "float32" or (tensor.inputs and tensor.inputs[0].op in _COMPUTE):
        return False
    given = isinstance(tensor, gs.Variable) and not tensor.inputs
    return given or any(_holds_mask(found) for found in _before(tensor))


def _before(tensor: gs.Tensor) -> Iterator[gs.Tensor]:
    """Yield a tensor and the nearest ones that it is computed from, up to the products of matrices."""
    waiting, seen, visited = [tensor], {id(tensor)}, 0
    while waiting and visited < _NEAREST:
        found = waiting.pop(0)
        yield found
        for node in found.inputs:
            visited += 1
            if node.op not in _COMPUTE:
                fresh = [t for t in node.inputs if id(t) not in seen]
                seen.update(id(t) for t in fresh)
                waiting += fresh


def _holds_mask(tensor: gs.Tensor) -> bool:
    weight = weight_of(tensor)
    if weight is None or dtype_name(tensor) != "float32" or int(np.prod(weight.shape)) > _LARGEST_MASK:
        return False
    values = np.asarray(weight.values())
    # Masks are also written as (m - 1) * 10000, so one large number counts whatever its sign.
    lowest = -np.abs(values).max(initial=0) if values.size == 1 else values.min(initial=0)
    return bool(lowest <= LOWEST_NORMAL_EXPONENT)


def _floor(graph: gs.Graph, names: FreshNames, node: gs.Node) -> None:
    scores, base = node.inputs[0], node.name or node.outputs[0].name
    largest, lowest, floored = (
        gs.Variable(names(f"{base}_{what}"), dtype=np.dtype(np.float32)) for what in ("largest", "lowest", "floored")
    )
    floored.shape = scores.shape
    attrs: dict[str, object] = {"keepdims": 1}
    axes = []
    if int(graph.opset) >= _AXES_AS_INPUT:
        axes = [constant(names(f"{base}_axis"), np.asarray([-1], np.int64))]
    else:
        attrs["axes"] = [-1]
    distance = constant(names(f"{base}_floor"), np.asarray(FLOOR, np.float32))
    for op, inputs, output, with_attrs in (
        ("ReduceMax", [scores, *axes], largest, attrs),
        ("Sub", [largest, distance], lowest, {}),
        ("Max", [scores, lowest], floored, {}),
    ):
        name = names(f"{base}_{op}")
        graph.nodes.append(gs.Node(op=op, name=name, attrs=with_attrs, inputs=inputs, outputs=[output]))
    node.inputs[0] = floored
