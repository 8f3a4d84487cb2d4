"""Quantize layer by layer: each layer's statistics are those of the input that the quantized layers before it give.

The float model and the model with the weights quantized so far run side by side, segment by segment, over the same
data. In front of each layer its input is known in both: the one tells what the layer will read, the other what it
should answer. Then its weight is quantized, and the second model goes on with it. Activations that get codes too are
not rounded on the way: only errors of weights are passed on.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...calibrate.errors import DataError
from ...calibrate.qarray import QArray, dequantize
from ...calibrate.stats.channel_amax import ChannelAmax
from ...calibrate.stats.gram import Gram
from ...calibrate.stats.tokens import as_tokens
from ...calibrate.weights import WEIGHT_METHODS, WeightStats
from ..calibration import Calibration
from ..calibration.observe import Detail
from ..constants import Weight, weight_of
from ..graph import Model
from ..graph.scratch import keep
from ..layouts import Layout, layout_of
from ..plan import Decision, Plan, Site
from ..segments import Cuts, Stream
from ..streaming import kept
from .details import wanted_details
from .weights import in_matrix_order, quantize_layer, quantize_weights

Array = npt.NDArray[Any]
Batch = Mapping[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A weight whose algorithm looks at the layer's input."""

    decision: Decision
    weight: Weight
    layout: Layout

    def quantize(self, stats: WeightStats) -> QArray:
        """Return the codes of the weight."""
        spec, method = self.decision.spec, WEIGHT_METHODS.resolve(self.decision.algorithm)
        assert spec is not None
        found = quantize_layer(self.weight.values(), spec, self.layout, method, in_matrix_order(self.layout, stats))
        return QArray(q=keep(found.q), params=kept(found.params))


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What layers are run on.

    Attributes:
        batches: Array by input name; kept while the layers are quantized.
        device: Where the model runs.
        op_libraries: Libraries of custom operators that it needs.
        progress: Told how many layers are done, and of how many.
    """

    batches: Iterable[Batch]
    device: str = "cpu"
    op_libraries: tuple[Path, ...] = ()
    progress: Callable[[int, int], None] | None = None


def quantize_in_order(
    model: Model, plan: Plan, data: Data, calibration: Calibration | None = None
) -> dict[Site, QArray]:
    """Quantize every weight that the plan names; those whose algorithm looks at inputs one after the other.

    Args:
        model: The float model.
        plan: What was decided; names the algorithm of each weight.
        data: What the layers are run on.
        calibration: Statistics of the float model, for what cannot be run in order: layers in bodies of If, Loop and
            Scan.

    Returns:
        Codes and parameters by site.

    Raises:
        DataError: There are no batches, or they do not fit the model.
        UnsupportedError: Something else than a tensor passes from layer to layer.
    """
    layers = _layers(model.graph, plan)
    in_order = {layer.decision.site for group in layers.values() for layer in group}
    rest = tuple(d for d in plan.decisions if d.site not in in_order)
    result = quantize_weights(model.graph, dataclasses.replace(plan, decisions=rest), calibration)
    if not layers:
        return result
    by_node = {d.site.node: d.site for d in plan.quantized() if d.site.role == "weight" and d.form != "outlier"}

    def rounded(node: str) -> dict[int, Array]:
        site = by_node.get(node)
        return {} if site is None else {site.index: _rounded(result[site])}

    cuts = Cuts.of(model, layers)
    batches = list(data.batches)
    if not batches:
        raise DataError("the data gave no samples", do="a generator that was iterated before is empty the second time")
    where = {"device": data.device, "op_libraries": data.op_libraries}
    floats, quantized = Stream.of(cuts, batches, **where), Stream.of(cuts, batches, replaced=rounded, **where)
    details, done = wanted_details(model.graph, "gram"), 0
    for tensor in cuts.places:
        stats = _statistics(floats, quantized, tensor, details[tensor])
        for layer in layers[tensor]:
            result[layer.decision.site] = layer.quantize(stats)
        done += len(layers[tensor])
        if data.progress is not None:
            data.progress(done, len(in_order))
    return result


def run_seconds(model: Model, data: Data) -> float:
    """Return about how long it takes to run all data through the model once; one batch is run, twice.

    Args:
        model: The float model.
        data: What it is run on.
    """
    batches = list(data.batches)
    reads = [t.name for node in reversed(model.graph.nodes) for t in node.inputs if isinstance(t, gs.Variable)]
    last = next((name for name in reads if name), None)
    if not batches or last is None:
        return 0.0
    options = {"device": data.device, "op_libraries": data.op_libraries}
    values = Stream.of(Cuts.of(model, [last]), batches[:1] * 2, **options).advance(last)
    start = time.perf_counter()
    first, second = (time.perf_counter() for _ in values)
    return first - start + (len(batches) - 1) * (second - first)


def layers_in_order(graph: gs.Graph, plan: Plan) -> int:
    """Return how many layers `quantize_in_order` quantizes one after the other."""
    return sum(map(len, _layers(graph, plan).values()))


def _layers(graph: gs.Graph, plan: Plan) -> dict[str, list[_Layer]]:
    """Return the layers that are quantized in order, by the tensor that they read."""
    nodes = {node.name: node for node in graph.nodes}
    details = wanted_details(graph, "gram")
    found: dict[str, list[_Layer]] = {}
    for decision in plan.quantized():
        node = nodes.get(decision.site.node)
        if decision.site.role != "weight" or decision.form == "outlier" or node is None:
            continue
        weight = weight_of(node.inputs[decision.site.index])
        assert weight is not None
        layout, tensor = layout_of(node, weight.shape), node.inputs[0].name
        if WEIGHT_METHODS.resolve(decision.algorithm).needs and layout.groups == 1 and tensor in details:
            found.setdefault(tensor, []).append(_Layer(decision=decision, weight=weight, layout=layout))
    return found


def _statistics(floats: Stream, quantized: Stream, tensor: str, detail: Detail) -> WeightStats:
    """Return the statistics of a layer's input behind the quantized layers, and how far it is off."""
    total = WeightStats()
    for was, now in zip(floats.advance(tensor), quantized.advance(tensor), strict=True):
        total = _plus(total, was, now, detail)
    return total


def _plus(total: WeightStats, was: Array, now: Array, detail: Detail) -> WeightStats:
    if now.size == 0:
        return total
    x, wanted = (as_tokens(array, detail.axis, detail.window) for array in (now, was))
    channels, gram = ChannelAmax.of(x), Gram.of(x)
    if total.gram is not None and total.channels is not None:
        channels, gram = total.channels.merge(channels), total.gram.merge(gram)
    drift = (wanted - x).astype(np.float64).T @ x.astype(np.float64)
    if total.drift is not None:
        drift += total.drift
    return WeightStats(gram=gram, channels=channels, drift=drift)


def _rounded(qarray: QArray) -> Array:
    """Return the weight as the quantized model will have it."""
    return dequantize(QArray(q=np.asarray(qarray.q), params=qarray.params))
