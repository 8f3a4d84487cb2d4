"""Solve: plan and calibration become scales and zero points of activations. No model is run."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from ...calibrate.qarray import QParams, Range, Spec, params_from_range
from ...calibrate.ranges import resolve
from ...calibrate.ranges.auto import Auto, choose
from ...calibrate.stats.histogram import Histogram
from ..calibration import Calibration
from ..plan import Plan

Key = tuple[str, Spec]
"""A tensor and how it is stored; the same tensor may be stored in two ways for two consumers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """Range and parameters of one activation.

    Attributes:
        range: The real interval that the codes cover.
        params: Scale and zero point.
        method: Calibration method that chose it.
    """

    range: Range
    params: QParams
    method: str


def solve(plan: Plan, calibration: Calibration | None, method: str) -> dict[Key, Solved]:
    """Choose a range for every activation that the plan quantizes statically.

    Tensors of one group share the range of their merged statistics.

    Args:
        plan: Decisions of the roles ``activation`` and ``output`` are solved.
        calibration: Statistics; may be None when the plan has no static activation.
        method: Name of a calibration method, see `calibrate.ranges`.

    Returns:
        The solved parameters by tensor name and spec.
    """
    wanted = [
        (d.site.tensor, d.spec)
        for d in plan.quantized()
        if d.site.role in ("activation", "output") and d.form == "qdq" and d.spec is not None
    ]
    if not wanted or calibration is None:
        return {}
    members: dict[str, set[str]] = defaultdict(set)
    for tensor, _ in wanted:
        members[plan.groups.get(tensor, tensor)].add(tensor)
    merged = {group: _merged(names, calibration) for group, names in members.items()}
    done: dict[Key, Solved] = {}
    by_group: dict[Key, Solved] = {}
    for tensor, spec in wanted:
        group = plan.groups.get(tensor, tensor)
        if (group, spec) not in by_group:
            by_group[group, spec] = _solve_one(merged[group], spec, method)
        done[tensor, spec] = by_group[group, spec]
    return done


def _merged(names: set[str], calibration: Calibration) -> Histogram:
    histogram = Histogram.empty()
    for name in sorted(names):
        if name in calibration.tensors:
            histogram = histogram.merge(calibration.tensors[name].histogram)
    return histogram


def _solve_one(histogram: Histogram, spec: Spec, method: str) -> Solved:
    # Of two values none can be spared: so few are the ends of a range, as of an equalized tensor.
    name = method if histogram.finite > 2 else "minmax"
    chosen = resolve(name)
    if isinstance(chosen, Auto):
        name, rng = choose(histogram, spec, chosen.tolerance)
    else:
        rng = chosen(histogram, spec)
    return Solved(range=rng, params=params_from_range(rng, spec), method=name)
