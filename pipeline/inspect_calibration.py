"""What is in a calibration: ranges, what each method would clip, channels that stick out; also as a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..calibrate.formats import FORMATS
from ..calibrate.qarray import Range, Spec
from ..calibrate.ranges import resolve
from ..calibrate.ranges.auto import pick
from ..calibrate.stats.channel_amax import OutlierChannel, outlier_channels
from ..calibrate.stats.histogram import F64, Bins, Histogram
from .calibration import Calibration, TensorStats
from .charts import histogram_svg
from .report import Chart, Column, Report, Table, show

METHODS = ("minmax", "percentile", "mse", "entropy")
NINES = 0.9999
SHOWN_CHANNELS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRow:
    """Facts about one activation.

    Attributes:
        tensor: Its name.
        values: Values seen.
        lo: Exact smallest.
        hi: Exact largest.
        p9999: Magnitude below which 99.99 % of the values lie.
        zeros: Share of values that are zero.
        nan: NaN seen.
        inf: Infinities seen.
        masks: Finite values so large that they are masks.
        ranges: Range per method.
        clipped: Share of the values outside the range, per method.
        auto: The one of these methods that ``auto`` takes.
        outliers: Channels that stick out, largest first; empty also where channels were not observed.
    """

    tensor: str
    values: int
    lo: float
    hi: float
    p9999: float
    zeros: float
    nan: int
    inf: int
    masks: int
    ranges: dict[str, tuple[float, float]]
    clipped: dict[str, float]
    auto: str
    outliers: tuple[OutlierChannel, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON data."""
        return asdict(self)


def inspect_calibration(
    calibration: Calibration, *, methods: Sequence[str] = METHODS, spec: Spec | None = None
) -> list[TensorRow]:
    """Return a row per tensor, in the order of the file.

    Args:
        calibration: The statistics.
        methods: Calibration methods to compare, options included: ``"percentile:99.9"``.
        spec: What the ranges are meant for; asymmetric uint8 unless given.

    Raises:
        RecipeError: No method is called so.
    """
    wanted = spec or Spec(format=FORMATS.get("uint8"), symmetric=False)
    solvers = {name: resolve(name) for name in methods}
    rows = []
    for name, stats in calibration.tensors.items():
        solved = {method: solve(stats.histogram, wanted) for method, solve in solvers.items()}
        rows.append(_row(name, stats, solved, pick(solved, stats.histogram, wanted)))
    return rows


def calibration_report(calibration: Calibration, rows: Iterable[TensorRow], *, title: str) -> Report:
    """Return the rows as a report with one histogram per tensor."""
    listed = list(rows)
    charts = [_chart(calibration.tensors[row.tensor].histogram, row) for row in listed]
    totals = {"samples": calibration.samples, "tensors": len(listed), "not_covered": len(calibration.not_covered)}
    notes = [f"{name} was not observed: {why}" for name, why in calibration.not_covered.items()]
    notes += [
        f"{row.tensor}: {row.nan} NaN and {row.inf} infinities were left out" for row in listed if row.nan or row.inf
    ]
    notes += [f"{row.tensor}: {row.masks} mask values were left out" for row in listed if row.masks]
    notes += [f"{row.tensor} is dead: all of its values are 0" for row in listed if row.zeros == 1]
    return Report(
        kind="calibration",
        title=title,
        totals=totals,
        tables=(_table(listed),),
        charts=tuple(charts),
        notes=tuple(notes),
        environment={"versions": dict(calibration.versions)},
    )


def share_clipped(bins: Bins, limits: tuple[float, float]) -> float:
    """Return the share of the values outside ``limits``; values count as spread evenly inside a bin."""
    total = float(bins.counts.sum())
    if not total:
        return 0.0
    lo, hi = limits
    width = bins.high - bins.low
    # A bin without width is a single value: inside, or not.
    below = np.where(width > 0, np.clip((lo - bins.low) / np.where(width > 0, width, 1), 0, 1), bins.low < lo)
    above = np.where(width > 0, np.clip((bins.high - hi) / np.where(width > 0, width, 1), 0, 1), bins.high > hi)
    return float((bins.counts * np.minimum(below + above, 1)).sum() / total)


def _row(name: str, stats: TensorStats, solved: dict[str, Range], auto: str) -> TensorRow:
    histogram = stats.histogram
    extrema, bins = histogram.extrema, histogram.bins()
    ranges = {method: _limits(rng) for method, rng in solved.items()}
    return TensorRow(
        tensor=name,
        values=histogram.total,
        lo=histogram.lo,
        hi=histogram.hi,
        p9999=_magnitude(histogram, NINES),
        zeros=histogram.zero / histogram.finite if histogram.finite else 0.0,
        nan=extrema.nan,
        inf=extrema.pos_inf + extrema.neg_inf,
        masks=extrema.sentinel,
        ranges=ranges,
        clipped={method: share_clipped(bins, limits) for method, limits in ranges.items()},
        auto=auto,
        outliers=() if stats.channels is None else tuple(outlier_channels(stats.channels)),
    )


def _limits(chosen: Range) -> tuple[float, float]:
    return float(chosen.lo.reshape(-1)[0]), float(chosen.hi.reshape(-1)[0])


def _magnitude(histogram: Histogram, share: float) -> float:
    """Return the magnitude below which ``share`` of all values lie, zeros included; linear inside a bin."""
    bins = histogram.absolute().bins()
    if not len(bins.counts):
        return 0.0
    seen = np.cumsum(bins.counts)
    wanted = share * seen[-1]
    k = min(int(np.searchsorted(seen, wanted)), len(seen) - 1)
    inside = (wanted - (seen[k] - bins.counts[k])) / bins.counts[k]
    return float(bins.low[k] + inside * (bins.high[k] - bins.low[k]))


def _chart(histogram: Histogram, row: TensorRow) -> Chart:
    bins = histogram.bins()
    edges = np.unique(np.concatenate([bins.low, bins.high]))
    if len(edges) < 2:
        edges = np.array([row.lo, row.hi])
    counts = _on_edges(bins, edges)
    svg = histogram_svg(edges, counts, row.ranges)
    return Chart(title=row.tensor, svg=svg, caption=f"{show(row.values, 'count')} values")


def _on_edges(bins: Bins, edges: F64) -> F64:
    """Return how many values lie between neighbouring edges; a bin lies between two neighbours or on one edge."""
    place = np.clip(np.searchsorted(edges, bins.center, side="right") - 1, 0, max(len(edges) - 2, 0))
    return np.bincount(place, weights=bins.counts, minlength=len(edges) - 1).astype(np.float64)


def _table(rows: Sequence[TensorRow]) -> Table:
    methods = list(rows[0].clipped) if rows else []
    columns = (
        Column(key="tensor", title="tensor"),
        Column(key="lo", title="min", kind="number"),
        Column(key="hi", title="max", kind="number"),
        Column(key="p9999", title="p99.99", kind="number", about="99.99 % of the magnitudes are below"),
        Column(key="zeros", title="zeros", kind="share"),
        *(Column(key=m, title=m, kind="share", about=f"share of the values that {m} clips") for m in methods),
        Column(key="auto", title="auto", about="the method that auto takes for asymmetric uint8"),
        Column(key="outliers", title="outlier channels", about="index (largest magnitude, share of the energy)"),
    )
    title = "Activations, and the share of their values that each method clips"
    about = "For asymmetric uint8. Outlier channels: index (largest magnitude, share of the tensor's energy)."
    return Table(name="tensors", title=title, columns=columns, rows=tuple(map(_cells, rows)), about=about)


def _cells(row: TensorRow) -> Mapping[str, Any]:
    shown = [f"{o.channel} ({o.amax:.3g}, {o.share:.0%})" for o in row.outliers[:SHOWN_CHANNELS]]
    more = len(row.outliers) - len(shown)
    text = ", ".join(shown) + (f" and {more} more" if more else "")
    plain = {key: getattr(row, key) for key in ("tensor", "lo", "hi", "p9999", "zeros", "auto")}
    return {**plain, **row.clipped, "outliers": text or None}
