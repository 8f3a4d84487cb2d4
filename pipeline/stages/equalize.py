"""Equalize: move what is hard to quantize from activations to weights; the float function stays what it was.

All layers that read one tensor share one scale: their weights are multiplied by it, and the tensor is divided by it, in
what makes it when nobody else reads it (`folding`), in a Mul of its own otherwise. What the layers then read is a new
tensor. Its statistics follow from what is known per channel of the old one, so nothing is collected again: its range is
the one that just holds all channels, whatever the calibration method, for after equalizing no channel is left to clip.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...calibrate.equalize import EQUALIZERS
from ...calibrate.equalize.layer_errors import LayerErrors
from ...calibrate.equalize.smoothquant import search
from ...calibrate.errors import DataError
from ...calibrate.granularity import per_channel
from ...calibrate.qarray import Spec
from ...calibrate.stats.histogram import Histogram
from ...calibrate.weights import WeightStats
from ..calibration import Calibration, TensorStats
from ..constants import weight_of
from ..extents import reader_of, scale_region
from ..fresh import FreshNames
from ..graph import Lazy, constant
from ..graph.halves import widened
from ..graph.lazy import Reader as RegionReader
from ..graph.lazy import Region
from ..graph.parallel import cores
from ..layouts import Layout, layout_of
from ..ordering import sort_nodes
from ..plan import Decision, Plan
from ..recipe import AUTO, Recipe
from .cross_layer import CROSS_LAYER
from .folding import can_fold, fold
from .weights import layer_stats

Array = npt.NDArray[Any]

AUTO_EQUALIZER = "smoothquant"
"""What ``auto`` takes for layers that multiply 8-bit codes with static scales."""
_THREADS = 4
"""Tensors that are looked at at a time at most: each needs copies of the weights that read it."""
WORTH_A_MUL = 0.5
"""Share of the expected error that ``auto`` must leave at most to put a Mul in front of layers."""
TRUSTED_TOKENS = 256
"""Values per channel from which on ``auto`` believes their largest magnitude: that of a few says little of the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A layer that reads the tensor, how its weight lies, and how weight and tensor are to be stored."""

    node: gs.Node
    layout: Layout
    spec: Spec
    x_spec: Spec | None

    def matrix(self) -> Array:
        """Return the weight [out, in]."""
        weight = weight_of(self.node.inputs[1])
        assert weight is not None
        return self.layout.matrix(np.asarray(weight.values(), dtype=np.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One tensor that an equalizer looks at.

    Attributes:
        tensor: In the float graph.
        readers: Layers that read it, and are to be quantized.
        stats: What is known of it.
        folds: Whether a division by a channel scale goes into what makes it; if not, it takes a Mul.
    """

    tensor: gs.Tensor
    readers: list[Reader]
    stats: WeightStats
    folds: bool

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(reader.node.name for reader in self.readers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Equalized:
    """One tensor that was divided by a channel scale.

    Attributes:
        tensor: Its name in the float graph.
        layers: Names of the layers that read it.
        spread: Largest over smallest channel scale.
        folded: Whether the division went into the operator that makes the tensor.
        divider: Name of the Mul that divides it, ``""`` where the division was folded.
    """

    tensor: str
    layers: tuple[str, ...]
    spread: float
    folded: bool
    divider: str = ""


def kept_of(equalized: Iterable[Equalized]) -> dict[str, str]:
    """Return the nodes that must stay in float: a scale per channel, stored with one scale, would be lost."""
    return {
        entry.divider: "divides by a scale per channel, which codes would round" for entry in equalized if entry.divider
    }


def equalize(
    graph: gs.Graph, plan: Plan, recipe: Recipe, calibration: Calibration | None
) -> tuple[list[Equalized], Calibration | None]:
    """Equalize the inputs of the MatMul and Gemm layers that a plan quantizes; ``graph`` is changed in place.

    Args:
        graph: Prepared float graph.
        plan: What is to be quantized, and how; to be made anew afterwards, for the layers read new tensors.
        recipe: Names the equalizer.
        calibration: Statistics of layer inputs, per channel at least.

    Returns:
        What was done, tensors for which no scale helps left out; and the statistics with those of the new tensors.

    Raises:
        DataError: Statistics that a named equalizer needs are missing; ``auto`` passes over such tensors.
    """
    if not _searches(recipe, calibration):
        return [], calibration
    known, done, names = calibration or Calibration(tensors={}), list[Equalized](), FreshNames(graph)
    added, kept = dict[str, TensorStats](), _kept(graph, plan)
    found = list(candidates(graph, plan, recipe, calibration))
    with ThreadPoolExecutor(min(_THREADS, cores())) as pool:
        scales = list(pool.map(lambda candidate: _scale(candidate, str(recipe.equalize)), found))
    for candidate, scale in zip(found, scales, strict=True):
        tensor, old = candidate.tensor, candidate.tensor.name
        if np.allclose(scale, 1.0):
            continue
        for reader in candidate.readers:
            _multiply(reader, scale, names)
        result = tensor
        if candidate.folds:
            fold(tensor, scale, names, kept)
            tensor.name = names(f"{old}_equalized")
        else:
            result = _divide(graph, tensor, candidate.readers, scale, names)
        divider, spread = "" if candidate.folds else result.inputs[0].name, float(scale.max() / scale.min())
        done.append(
            Equalized(tensor=old, layers=candidate.layers, spread=spread, folded=candidate.folds, divider=divider)
        )
        added[result.name] = _scaled(candidate.stats, scale)
    if not done:
        return [], calibration
    graph.cleanup(remove_unused_graph_inputs=False)
    sort_nodes(graph)
    return done, dataclasses.replace(known, tensors={**known.tensors, **added})


def candidates(graph: gs.Graph, plan: Plan, recipe: Recipe, calibration: Calibration | None) -> Iterator[Candidate]:
    """Yield the tensors that `equalize` looks at; no weight is read for that.

    Args:
        graph: Prepared float graph; each tensor is judged when its turn comes, in the graph as it then is.
        plan: What is to be quantized, and how.
        recipe: Names the equalizer.
        calibration: Statistics of layer inputs, per channel at least.

    Raises:
        DataError: As `equalize`.
    """
    if not _searches(recipe, calibration):
        return
    known, kept, name = calibration or Calibration(tensors={}), _kept(graph, plan), str(recipe.equalize)
    for tensor, readers in _readers(graph, plan, every=name != AUTO):
        if name == AUTO and not _own_their_weights(readers):
            continue
        stats = _stats_of(tensor, readers[0].layout, name, known)
        if stats is not None:
            private = len(tensor.outputs) == len(readers) and all(tensor is not output for output in graph.outputs)
            folds = private and can_fold(tensor, len(readers[0].layout.columns()), kept)
            yield Candidate(tensor=tensor, readers=readers, stats=stats, folds=folds)


def _searches(recipe: Recipe, calibration: Calibration | None) -> bool:
    """Whether scales are to be looked for."""
    return recipe.equalize not in (None, CROSS_LAYER) and (recipe.equalize != AUTO or calibration is not None)


def needs_of(recipe: Recipe) -> frozenset[str]:
    """Return the statistics that the equalizer of a recipe cannot do without; ``auto`` does without any."""
    if recipe.equalize in (None, AUTO, CROSS_LAYER):
        return frozenset()
    return EQUALIZERS.resolve(str(recipe.equalize)).needs


def _kept(graph: gs.Graph, plan: Plan) -> set[int]:
    """Return the ``id`` of tensors that must keep their values: outputs, and what products of activations quantize.

    Statistics of the latter are of one tensor as a whole, and do not tell what is left of it once channels are divided.
    """
    weighted = set(_by_node(plan, "weight"))
    products = {d.site.node for d in plan.quantized() if d.op == "MatMul"} - weighted
    read = [tensor for node in graph.nodes if node.name in products for tensor in node.inputs]
    return {id(tensor) for tensor in (*graph.outputs, *read)}


def _readers(graph: gs.Graph, plan: Plan, *, every: bool) -> list[tuple[gs.Tensor, list[Reader]]]:
    """Return the tensors that quantized layers read, each with these layers; static 8-bit ones unless ``every``."""
    weights, inputs = (_by_node(plan, role) for role in ("weight", "activation"))
    found: dict[int, tuple[gs.Tensor, list[Reader]]] = {}
    for node in graph.nodes:
        decision, data = weights.get(node.name), inputs.get(node.name)
        if decision is None or decision.spec is None or decision.site.index != 1 or not _is_layer(node, decision):
            continue
        if not every and not _is_static_byte(decision, data):
            continue
        weight = weight_of(node.inputs[1])
        if weight is None or len(weight.shape) != 2 or isinstance(node.inputs[0], gs.Constant):
            continue
        layout, x_spec = layout_of(node, weight.shape), data.spec if data is not None else None
        entry = found.setdefault(id(node.inputs[0]), (node.inputs[0], []))
        entry[1].append(Reader(node=node, layout=layout, spec=layout.spec(decision.spec), x_spec=x_spec))
    return list(found.values())


def _own_their_weights(readers: list[Reader]) -> bool:
    """Whether nobody else reads the layers' weights, which would be stored twice, once equalized."""
    weights = [weight_of(reader.node.inputs[1]) for reader in readers]
    return all(weight is not None and len(weight.constant.outputs) == 1 for weight in weights)


def _by_node(plan: Plan, role: str) -> dict[str, Decision]:
    return {d.site.node: d for d in reversed(plan.quantized()) if d.site.role == role and d.form != "cast"}


def _is_layer(node: gs.Node, decision: Decision) -> bool:
    return node.op in ("MatMul", "Gemm") and not node.attrs.get("transA", 0) and decision.form not in ("outlier",)


def _is_static_byte(decision: Decision, data: Decision | None) -> bool:
    if data is None or data.spec is None or data.form != "qdq":
        return False
    specs = (decision.spec, data.spec)
    return all(spec is not None and spec.format.is_integer and spec.format.bits == 8 for spec in specs)


def _stats_of(tensor: gs.Tensor, layout: Layout, name: str, calibration: Calibration) -> WeightStats | None:
    stats = layer_stats(layout, calibration, tensor.name)
    known = stats is not None and stats.channels is not None
    if name == AUTO:
        return stats if stats is not None and known and stats.channels.tokens >= TRUSTED_TOKENS else None
    if known:
        return stats
    level = "gram" if "gram" in EQUALIZERS.resolve(name).needs else "channels"
    raise DataError(
        f"{name} needs statistics per channel of {tensor.name!r}",
        expected=f"statistics collected with --detail {level}",
        do=f"qpipe calibrate model.onnx --data data.npz --detail {level} -o model.qcal",
    )


def _scale(candidate: Candidate, name: str) -> Array:
    """Return the channel scale [in] of one tensor, 1 throughout where it does not pay."""
    first, stats = candidate.readers[0], candidate.stats
    parts = [reader.matrix() for reader in candidate.readers]
    matrix = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if name != AUTO:
        return np.asarray(EQUALIZERS.resolve(name)(matrix, first.spec, stats, first.x_spec), dtype=np.float32)
    errors = LayerErrors(matrix, first.spec, stats, first.x_spec)
    scale = search(errors)
    unscaled = np.ones_like(scale)
    if candidate.folds:
        return scale
    limit = errors.total(scale) / WORTH_A_MUL
    return scale if errors.total(unscaled, enough=limit) >= limit else unscaled


def _scaled(stats: WeightStats, scale: Array) -> TensorStats:
    """Return the statistics of the tensor divided by ``scale`` [in]; its histogram holds the ends of its range."""
    scaled = stats.scaled(scale)
    ends = np.asarray(scaled.interval, dtype=np.float32)
    return TensorStats(histogram=Histogram.of(ends), channels=scaled.channels, gram=scaled.gram)


def _multiply(reader: Reader, scale: Array, names: FreshNames) -> None:
    """Multiply the weight of a layer by ``scale`` [in], region by region when it is read."""
    old = reader.node.inputs[1]
    weight = weight_of(old)
    assert weight is not None
    axis, dtype = reader.layout.order[1], weight.constant.dtype
    factors = np.expand_dims(scale, 1 - axis)

    def opener() -> RegionReader:
        read = reader_of(weight)

        def scaled(region: Region) -> Array:
            place = scale_region(region, per_channel(axis), len(region))
            return (widened(read(region)) * factors[place]).astype(dtype, copy=False)

        return scaled

    reader.node.inputs[1] = constant(names(f"{old.name}_equalized"), Lazy(weight.shape, dtype, opener))


def _divide(graph: gs.Graph, tensor: gs.Tensor, readers: list[Reader], scale: Array, names: FreshNames) -> gs.Tensor:
    dtype = np.float32 if tensor.dtype is None else tensor.dtype
    inverse = constant(names(f"{tensor.name}_channel_scale"), (1 / scale).astype(dtype))
    result = gs.Variable(names(f"{tensor.name}_equalized"), dtype=tensor.dtype, shape=tensor.shape)
    node = gs.Node(op="Mul", name=names(f"{tensor.name}_Equalize"), inputs=[tensor, inverse], outputs=[result])
    graph.nodes.append(node)
    for reader in readers:
        reader.node.inputs[0] = result
    return result
