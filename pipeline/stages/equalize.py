"""Equalize: move what is hard to quantize from activations to weights; the float function stays what it was.

All layers that read one tensor share one scale: their weights are multiplied by it, and the tensor is divided by it, in
the LayerNorm that makes it when nobody else reads it, in a Mul of its own otherwise. What the layers then read is a new
tensor, which needs statistics of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...calibrate.equalize import EQUALIZERS
from ...calibrate.errors import DataError
from ..calibration import Calibration
from ..constants import Weight, weight_of
from ..fresh import FreshNames
from ..graph import constant
from ..layouts import Layout, layout_of
from ..patterns import matches
from ..recipe import Recipe
from ..targets import TARGETS
from .weights import layer_stats

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A layer that reads the tensor, its weight, and how that lies."""

    node: gs.Node
    weight: Weight
    layout: Layout

    def matrix(self) -> Array:
        """Return the weight [out, in], float32; read from its file each time, for no model is held as a whole."""
        return self.layout.matrix(np.asarray(self.weight.values(), dtype=np.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Equalized:
    """One tensor that was divided by a channel scale.

    Attributes:
        tensor: Its name.
        layers: Names of the layers that read it.
        spread: Largest over smallest channel scale.
        folded: Whether the division went into the operator that makes the tensor.
    """

    tensor: str
    layers: tuple[str, ...]
    spread: float
    folded: bool


def equalize(graph: gs.Graph, recipe: Recipe, calibration: Calibration) -> list[Equalized]:
    """Equalize the inputs of all MatMul and Gemm layers that the recipe quantizes; ``graph`` is changed in place.

    Args:
        graph: Prepared float graph.
        recipe: Names the equalizer and the formats.
        calibration: Statistics of layer inputs at the level that the equalizer needs.

    Returns:
        What was done; tensors for which no scale helps are left alone and not listed.

    Raises:
        DataError: Statistics that the equalizer needs are missing.
    """
    assert recipe.equalize is not None
    done = []
    names = FreshNames(graph)
    for tensor, readers in _readers(graph, recipe):
        scale = _scale(tensor.name, readers, recipe, calibration)
        if np.allclose(scale, 1.0):
            continue
        for reader in readers:
            _multiply(reader, scale, names)
        folded = len(tensor.outputs) == len(readers) and _fold(tensor, scale, names)
        if not folded:
            _divide(graph, tensor, readers, scale, names)
        layers = tuple(reader.node.name for reader in readers)
        spread = float(scale.max() / scale.min())
        done.append(Equalized(tensor=tensor.name, layers=layers, spread=spread, folded=folded))
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return done


def _readers(graph: gs.Graph, recipe: Recipe) -> list[tuple[gs.Tensor, list[Reader]]]:
    """Return the tensors that quantized layers read, each with these layers."""
    found: dict[int, tuple[gs.Tensor, list[Reader]]] = {}
    for node in graph.nodes:
        if node.op not in ("MatMul", "Gemm") or node.attrs.get("transA", 0) or not _wanted(node, recipe):
            continue
        weight = weight_of(node.inputs[1])
        if weight is None or len(weight.shape) != 2 or isinstance(node.inputs[0], gs.Constant):
            continue
        entry = found.setdefault(id(node.inputs[0]), (node.inputs[0], []))
        entry[1].append(Reader(node=node, weight=weight, layout=layout_of(node, weight.shape)))
    return list(found.values())


def _wanted(node: gs.Node, recipe: Recipe) -> bool:
    if any(matches(pattern, node) for pattern in recipe.exclude):
        return False
    return not recipe.include or any(matches(pattern, node) for pattern in recipe.include)


def _scale(tensor: str, readers: list[Reader], recipe: Recipe, calibration: Calibration) -> Array:
    target = TARGETS.get(recipe.target)
    first = readers[0].layout
    stats = layer_stats(first, calibration, tensor)
    if stats is None:
        raise DataError(
            f"{recipe.equalize} needs statistics per channel of {tensor!r}",
            expected="statistics collected with --detail gram",
            do="qpipe quantize with --data, which collects what the recipe needs",
        )
    assert recipe.weights is not None
    own = recipe.weights.spec(*_axes(first))
    x_spec = None
    if recipe.activations is not None:
        x_spec = recipe.activations.spec(target.activation_format, target.activation_symmetric)
    stacked = np.concatenate([reader.matrix() for reader in readers])
    scale = EQUALIZERS.resolve(str(recipe.equalize))(stacked, first.spec(own), stats, x_spec)
    return np.asarray(scale, dtype=np.float32)


def _axes(layout: Layout) -> tuple[int, int]:
    return layout.order[0], layout.order[1]


def _multiply(reader: Reader, scale: Array, names: FreshNames) -> None:
    old = reader.node.inputs[1]
    scaled = reader.matrix() * scale
    values = scaled.T if reader.layout.order[0] == 1 else scaled
    dtype = np.float32 if old.dtype is None else old.dtype
    reader.node.inputs[1] = constant(names(f"{old.name}_equalized"), np.ascontiguousarray(values).astype(dtype))


def _fold(tensor: gs.Tensor, scale: Array, names: FreshNames) -> bool:
    """Divide scale and bias of the LayerNorm that makes ``tensor``; whether that was possible."""
    producer = tensor.inputs[0] if tensor.inputs else None
    if producer is None or producer.op not in ("LayerNormalization", "RMSNormalization"):
        return False
    parameters = [weight_of(t) for t in producer.inputs[1:3] if not t.is_empty()]
    if any(p is None or p.shape != scale.shape for p in parameters):
        return False
    for i, parameter in enumerate(parameters, start=1):
        assert parameter is not None
        old = parameter.values()
        producer.inputs[i] = constant(names(f"{producer.inputs[i].name}_equalized"), (old / scale).astype(old.dtype))
    tensor.name = names(f"{tensor.name}_equalized")
    return True


def _divide(graph: gs.Graph, tensor: gs.Tensor, readers: list[Reader], scale: Array, names: FreshNames) -> None:
    dtype = np.float32 if tensor.dtype is None else tensor.dtype
    inverse = constant(names(f"{tensor.name}_channel_scale"), (1 / scale).astype(dtype))
    result = gs.Variable(names(f"{tensor.name}_equalized"), dtype=tensor.dtype, shape=tensor.shape)
    node = gs.Node(op="Mul", name=names(f"{tensor.name}_Equalize"), inputs=[tensor, inverse], outputs=[result])
    graph.nodes.append(node)
    for reader in readers:
        reader.node.inputs[0] = result
