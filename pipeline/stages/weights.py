"""Weights: the plan's weight sites become codes, and no more than one weight is in memory at a time.

How much of it depends on the algorithm. Where the scales say everything about the codes, codes are made while the model
is saved, region by region. Where each output channel is quantized for itself, scales are found for a strip of them at a
time, on all cores. What is left needs the whole weight. Results that are large wait in the scratch file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...calibrate.errors import ModelError
from ...calibrate.granularity import PER_TENSOR
from ...calibrate.qarray import QArray, QParams, Range, Spec, params_from_range
from ...calibrate.stats.gram import Gram
from ...calibrate.weights import WEIGHT_METHODS, WeightMethod, WeightStats
from ...calibrate.weights.correction import corrected
from ..calibration import Calibration
from ..constants import Weight, weight_of
from ..extents import Extent, extent_jobs, reader_of
from ..graph import all_graphs, stored_size
from ..graph.constants import Values
from ..graph.halves import widened
from ..graph.lazy import Region, regions
from ..graph.parallel import in_order
from ..graph.scratch import keep, release
from ..layouts import Layout, layout_of
from ..plan import Decision, Plan, Site
from ..streaming import ROUNDING, STRIPS, in_strips, kept, lazy_codes

Array = npt.NDArray[Any]
Key = tuple[str, Spec | None, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surveyed:
    """What one pass over a weight tells.

    Attributes:
        is_finite: Whether all its values are.
        amax: Largest magnitude.
        params: Scales that hold the smallest and the largest value, where its algorithm asks for no others.
    """

    is_finite: bool
    amax: float
    params: QParams | None


_KNOWN: weakref.WeakKeyDictionary[Values, dict[Key, Surveyed]] = weakref.WeakKeyDictionary()
"""What was found of a weight, as long as it lives: values never change, and reading them is what takes time."""


def survey_weights(graph: gs.Graph, plan: Plan) -> dict[Key, Surveyed]:
    """Return what one pass over each weight of a plan tells, by `key_of`; a second call reads nothing again.

    All cores work at it, in the order of the files.
    """
    weights = {key_of(decision, weight): (decision, weight) for decision, weight in _weights(graph, plan)}
    found = {key: known for key, (_, weight) in weights.items() if (known := _known(weight).get(key)) is not None}
    extents: dict[Key, Extent] = {}

    def jobs() -> Iterator[Callable[[], tuple[Key, Region, Array, Array]]]:
        for key, (decision, weight) in weights.items():
            if key in found:
                continue
            granularity = decision.spec.granularity if decision.spec and _by_extent(decision) else PER_TENSOR
            extents[key] = Extent.empty(weight.shape, granularity)
            for job in extent_jobs(weight, granularity):
                yield partial(lambda key, job: (key, *job()), key, job)

    def finish(key: Key) -> None:
        decision, weight = weights[key]
        found[key] = _known(weight)[key] = _surveyed(decision, extents.pop(key))
        release(stored_size(weight.constant))

    with contextlib.closing(in_order(jobs())) as done:
        for key, parts in itertools.groupby(done, key=lambda part: part[0]):
            for _, *part in parts:
                extents[key].add(*part)
            finish(key)
    for key in list(extents):  # weights without elements
        finish(key)
    return found


def _known(weight: Weight) -> dict[Key, Surveyed]:
    held = weight.constant._values
    return _KNOWN.setdefault(held, {}) if isinstance(held, Values) else {}


def key_of(decision: Decision, weight: Weight) -> Key:
    """Return what stands for the codes of a weight, unless its algorithm looks at its input."""
    return weight.key, decision.spec, decision.algorithm


def _by_extent(decision: Decision) -> bool:
    """Whether smallest and largest values are all that the scales of a weight depend on."""
    limited = decision.spec is not None and decision.spec.pair_limit
    return decision.algorithm == "rtn" and decision.form != "outlier" and not limited


def _surveyed(decision: Decision, extent: Extent) -> Surveyed:
    params = None
    if extent.is_finite and decision.spec is not None and _by_extent(decision):
        params = kept(params_from_range(Range.of(extent.lo, extent.hi), decision.spec))
    return Surveyed(is_finite=extent.is_finite, amax=extent.amax, params=params)


def quantize_weights(graph: gs.Graph, plan: Plan, calibration: Calibration | None = None) -> dict[Site, QArray]:
    """Quantize every weight that the plan names, one at a time.

    A weight with two users of the same spec is quantized once, unless its algorithm looks at their inputs.

    Args:
        graph: The float graph.
        plan: What was decided; names the algorithm of each weight.
        calibration: Statistics of inputs, for algorithms that need them.

    Returns:
        Codes and parameters by site. Codes may be a `Lazy` array, which is made when it is read.

    Raises:
        DataError: An algorithm needs statistics that were not collected.
    """
    nodes = {node.name: node for inner in all_graphs(graph) for node in inner.nodes}
    known = survey_weights(graph, plan)
    cache: dict[tuple[Key, str], QArray] = {}
    result: dict[Site, QArray] = {}
    for decision, weight in _weights(graph, plan):
        if decision.form == "outlier":  # that form splits the weight itself
            continue
        node, key = nodes[decision.site.node], key_of(decision, weight)
        source = node.inputs[0].name if WEIGHT_METHODS.resolve(decision.algorithm).needs else ""
        if (key, source) not in cache:
            layout = layout_of(node, weight.shape)
            stats = layer_stats(layout, calibration, node.inputs[0].name)
            cache[key, source] = _quantized(weight, decision, layout, stats, known[key].params)
        result[decision.site] = cache[key, source]
    return result


def _quantized(
    weight: Weight, decision: Decision, layout: Layout, stats: WeightStats | None, params: QParams | None
) -> QArray:
    """Quantize one weight, with ``params`` if they are known, holding as little of it as its algorithm allows."""
    spec, name = decision.spec, decision.algorithm.partition(":")[0]
    assert spec is not None
    if params is None:
        rounds = name in ROUNDING and not spec.pair_limit
        quantizer = partial(quantize_layer, method=WEIGHT_METHODS.resolve(decision.algorithm), stats=stats)
        if name in STRIPS and _has_own_channels(spec, layout) and 0 not in weight.shape:
            codes = None if rounds else np.empty(weight.shape, spec.format.dtype)
            params = kept(in_strips(weight, spec, layout, quantizer, codes))
        else:
            found = quantizer(weight.values(), spec, layout)
            codes, params = found.q, kept(found.params)
        if not rounds:
            return QArray(q=keep(codes), params=params)
    return QArray(q=lazy_codes(weight, params), params=params)  # type: ignore[arg-type]


def _has_own_channels(spec: Spec, layout: Layout) -> bool:
    """Whether no scale serves two output channels."""
    return spec.granularity.axis is not None and spec.format.scale_levels < 2 and layout.groups == 1


def quantize_layer(
    w: Array, spec: Spec, layout: Layout, method: WeightMethod, stats: WeightStats | None = None
) -> QArray:
    """Quantize one weight.

    Args:
        w: Weight in the operator's own layout.
        spec: In the axes of that layout.
        layout: The way to [out, in] and back.
        method: The algorithm.
        stats: Statistics of the inputs of [out, in].
    """
    matrix = corrected(layout.matrix(np.asarray(w, dtype=np.float32)), stats)
    if layout.groups > 1 and method.needs:
        method, stats = WEIGHT_METHODS.get("rtn_mse"), None  # inputs differ from group to group
    return layout.restore(method(matrix, layout.spec(spec), stats), spec)


def layer_stats(layout: Layout, calibration: Calibration | None, tensor: str) -> WeightStats | None:
    """Return what was collected of a layer's input, in the order of the matrix's inputs; None when nothing was."""
    known = None if calibration is None else calibration.tensors.get(tensor)
    if known is None or layout.groups > 1 or (known.channels is None and known.gram is None):
        return None
    lo, hi = min(known.histogram.lo, 0.0), max(known.histogram.hi, 0.0)
    return in_matrix_order(layout, WeightStats(gram=known.gram, channels=known.channels, lo=lo, hi=hi))


def in_matrix_order(layout: Layout, stats: WeightStats) -> WeightStats | None:
    """Return statistics of a layer's input in the order of the matrix's inputs; None when they do not fit it."""
    columns = layout.columns()
    channels, gram, drift = stats.channels, stats.gram, stats.drift
    if channels is not None and len(channels.amax) != len(columns):
        return None
    if np.array_equal(columns, np.arange(len(columns))):  # most often: then nothing large is copied
        return stats
    if channels is not None:
        channels = dataclasses.replace(
            channels, amax=channels.amax[columns], total=channels.total[columns], energy=channels.energy[columns]
        )
    if gram is not None:
        gram = Gram(matrix=gram.matrix[np.ix_(columns, columns)], tokens=gram.tokens)
    if drift is not None:
        drift = drift[np.ix_(columns, columns)]
    return dataclasses.replace(stats, gram=gram, channels=channels, drift=drift)


def settle_nonfinite(graph: gs.Graph, plan: Plan, *, skip: bool) -> Plan:
    """Return the plan without the layers whose weights are not finite.

    Args:
        graph: The float graph.
        plan: What was decided without looking at values.
        skip: Leave such layers in float; otherwise the first one is an error.

    Raises:
        ModelError: A weight holds NaN or infinity, and ``skip`` is not set.
    """
    known = survey_weights(graph, plan)
    bad: dict[str, str] = {}
    for decision, weight in _weights(graph, plan):
        if known[key_of(decision, weight)].is_finite:
            continue
        count = _nonfinite(weight)
        if not skip:
            raise _not_finite(weight, count, int(np.prod(weight.shape)))
        bad[decision.site.node] = f"{count} values of its weight {weight.constant.name!r} are not finite"
    kept = tuple(
        dataclasses.replace(d, spec=None, form="qdq", reason=bad[d.site.node]) if d.site.node in bad else d
        for d in plan.decisions
    )
    return dataclasses.replace(plan, decisions=kept)


def settle_global(graph: gs.Graph, plan: Plan) -> Plan:
    """Return the plan with the one range of those weights that share a scale throughout the model written out.

    Args:
        graph: The float graph.
        plan: Names the algorithm ``fixed``, without a range, for such weights.
    """
    sharing = [(d, weight) for d, weight in _weights(graph, plan) if d.algorithm == "fixed"]
    if not sharing:
        return plan
    known = survey_weights(graph, plan)
    amax = max(known[key_of(d, weight)].amax for d, weight in sharing)
    settled = {d.site: dataclasses.replace(d, algorithm=f"fixed:{amax!r}") for d, _ in sharing}
    return dataclasses.replace(plan, decisions=tuple(settled.get(d.site, d) for d in plan.decisions))


def _nonfinite(weight: Weight) -> int:
    reader = reader_of(weight)
    return sum(int((~np.isfinite(widened(reader(region)))).sum()) for region in regions(weight.shape))


def _weights(graph: gs.Graph, plan: Plan) -> Iterator[tuple[Decision, Weight]]:
    nodes = {node.name: node for inner in all_graphs(graph) for node in inner.nodes}
    for decision in plan.quantized():
        if decision.site.role == "weight":
            weight = weight_of(nodes[decision.site.node].inputs[decision.site.index])
            assert weight is not None
            yield decision, weight


def _not_finite(weight: Weight, count: int, size: int) -> ModelError:
    return ModelError(
        "a weight holds values that are not finite",
        where=f"initializer {weight.constant.name!r}",
        found=f"{count} of {size} values are NaN or infinite",
        expected="finite values",
        do="train or export the model again, or leave the layer in float with --skip-nonfinite",
    )
