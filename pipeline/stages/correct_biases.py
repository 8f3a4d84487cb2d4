"""Correct biases: what quantizing adds to a layer's output on average is taken back in its bias.

The float model and the model with quantized weights run side by side over the data, as in `stages.sequential`. In front
of each layer the mean of its input is known in both, in the second one as the layer will read it, in codes; the layers
before it are corrected already. The bias is that of a Conv or Gemm, or the constant that an Add puts behind a MatMul.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...calibrate.bias import correction
from ...calibrate.errors import DataError
from ...calibrate.qarray import QArray, QParams, dequantize, quantize
from ...calibrate.stats.tokens import Window, as_tokens
from ..constants import weight_of
from ..forms.bias import SLOT
from ..fresh import FreshNames
from ..graph import Model, constant
from ..plan import Decision, Plan, Site
from ..segments import Cuts, Stream
from .details import window_of
from .sequential import Data
from .solve import Key, Solved

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A layer whose bias can be corrected.

    Attributes:
        node: Conv, Gemm or MatMul.
        holder: The node that adds the bias, and the number of its input that holds it.
        site: Of the weight.
        params: Scale of the codes of its input; None when it reads floats.
        window: How a Conv without groups reads its input.
    """

    node: gs.Node
    holder: tuple[gs.Node, int]
    site: Site
    params: QParams | None
    window: Window | None

    def matrix(self, w: Array) -> Array:
        """Return a weight as [out, in], that of a Conv of groups as [out, in/groups, k...]."""
        if self.node.op == "Conv":
            return w.reshape(len(w), -1) if self.window is not None else w
        return w if self.node.attrs.get("transB", 0) else w.T

    def tokens(self, x: Array) -> Array:
        """Return an input as [tokens, in]."""
        return as_tokens(x, 1 if self.node.op == "Conv" else -1, self.window)

    def seen(self, x: Array) -> Array:
        """Return an input as the quantized layer reads it."""
        return x if self.params is None else dequantize(quantize(np.asarray(x, np.float32), self.params))

    def bias(self) -> Array:
        """Return the bias in the float model."""
        node, slot = self.holder
        found = weight_of(node.inputs[slot])
        assert found is not None
        return np.asarray(found.values())


def give_biases(graph: gs.Graph) -> None:
    """Give every Conv and Gemm without a bias one of zeros, which costs nothing and can be corrected."""
    names = FreshNames(graph)
    for node in graph.nodes:
        bare = len(node.inputs) <= SLOT or node.inputs[SLOT].is_empty()
        weight = weight_of(node.inputs[1]) if node.op in ("Conv", "Gemm") and bare and not node.domain else None
        if weight is not None:
            size = weight.shape[0] if node.op == "Conv" or node.attrs.get("transB", 0) else weight.shape[1]
            zeros = np.zeros(size, dtype=np.asarray(weight.values()).dtype)
            node.inputs = [*node.inputs[:SLOT], constant(names(f"{node.name}_bias"), zeros)]


def correct_biases(
    model: Model, plan: Plan, data: Data | None, activations: Mapping[Key, Solved], weights: Mapping[Site, QArray]
) -> int:
    """Correct the biases of all quantized layers of the main graph; ``model`` is changed in place.

    Args:
        model: The float model.
        plan: What was decided.
        data: What the layers are run on.
        activations: Scales of the inputs.
        weights: Codes of the weights.

    Returns:
        Number of layers corrected; a MatMul without a constant added behind it has no bias, and is passed over.

    Raises:
        DataError: There is no data.
    """
    if data is None:
        raise DataError(
            "correcting biases takes data: a statistics file holds no means per channel",
            do="qpipe quantize model.onnx --data data.npz --set bias_correction=true -o quantized.onnx",
        )
    layers = list(_layers(model.graph, plan, {key: solved.params for key, solved in activations.items()}))
    by_input: dict[str, list[_Layer]] = {}
    for layer in layers:
        by_input.setdefault(layer.node.inputs[0].name, []).append(layer)
    replaced: dict[str, dict[int, Array]] = {d.site.node: {d.site.index: _real(weights[d.site])} for d in _stored(plan)}
    cuts, batches = Cuts.of(model, by_input), list(data.batches)
    where = {"device": data.device, "op_libraries": data.op_libraries}
    floats = Stream.of(cuts, batches, **where)
    quantized = Stream.of(cuts, batches, replaced=lambda node: replaced.get(node, {}), **where)
    for tensor in cuts.places:
        pairs = list(zip(floats.advance(tensor), quantized.advance(tensor), strict=True))
        for layer in by_input[tensor]:
            node, slot = layer.holder
            replaced.setdefault(node.name, {})[slot] = _corrected(layer, pairs, weights[layer.site])
    names = FreshNames(model.graph)
    for layer in layers:
        node, slot = layer.holder
        node.inputs[slot] = constant(names(f"{node.inputs[slot].name}_corrected"), replaced[node.name][slot])
    return len(layers)


def _corrected(layer: _Layer, pairs: list[tuple[Array, Array]], codes: QArray) -> Array:
    """Return the bias with the correction for the inputs in the float and in the quantized model."""
    total: list[Any] = [0.0, 0.0]
    tokens = 0
    for was, now in pairs:
        for i, x in enumerate((layer.tokens(was), layer.tokens(layer.seen(now)))):
            total[i] = total[i] + x.sum(axis=0, dtype=np.float64)
        tokens += len(x)
    bias, weight = layer.bias(), weight_of(layer.node.inputs[1])
    assert weight is not None
    if not tokens:
        return bias
    matrices = (layer.matrix(np.asarray(array)) for array in (weight.values(), _real(codes)))
    groups = 1 if layer.window is not None else int(layer.node.attrs.get("group", 1))
    change = correction(*matrices, *(np.asarray(part / tokens) for part in total), groups=groups)
    return (bias + change.reshape(bias.shape)).astype(bias.dtype)


def _stored(plan: Plan) -> Iterator[Decision]:
    yield from (d for d in plan.quantized() if d.site.role == "weight" and d.form in ("qdq", "dynamic", "nbits"))


def _layers(graph: gs.Graph, plan: Plan, params: Mapping[Key, QParams]) -> Iterator[_Layer]:
    nodes = {node.name: node for node in graph.nodes}
    inputs = {d.site.node: d for d in plan.quantized() if d.site.role == "activation" and d.site.index == 0}
    for decision in _stored(plan):
        node = nodes.get(decision.site.node)
        holder = None if node is None else _holder(node)
        if node is None or holder is None or decision.site.index != 1:
            continue
        data, window = inputs.get(node.name), None if node.op != "Conv" else window_of(node)
        known = None if data is None or data.spec is None else params.get((data.site.tensor, data.spec))
        yield _Layer(node=node, holder=holder, site=decision.site, params=known, window=window)


def _holder(node: gs.Node) -> tuple[gs.Node, int] | None:
    """Return which input of which node holds the bias of a layer, one value per output channel; None when none does."""
    weight, scaled = weight_of(node.inputs[1]), any(float(node.attrs.get(n, 1.0)) != 1.0 for n in ("alpha", "beta"))
    if weight is None or node.domain or scaled or node.attrs.get("transA", 0):
        return None
    found: tuple[gs.Node, int] | None = None
    if node.op in ("Conv", "Gemm"):
        found = (node, SLOT) if len(node.inputs) > SLOT else None
        channels = weight.shape[0] if node.op == "Conv" or node.attrs.get("transB", 0) else weight.shape[1]
    elif node.op == "MatMul" and len(weight.shape) == 2 and [r.op for r in node.outputs[0].outputs] == ["Add"]:
        add, channels = node.outputs[0].outputs[0], weight.shape[1]
        found = (add, 1 if add.inputs[0] is node.outputs[0] else 0)
    held = None if found is None else weight_of(found[0].inputs[found[1]])
    if held is None or held.shape[-1:] != (channels,) or held.shape[:-1] != (1,) * (len(held.shape) - 1):
        return None
    return found


def _real(codes: QArray) -> Array:
    return dequantize(QArray(q=np.asarray(codes.q), params=codes.params))
