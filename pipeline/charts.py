"""Pictures for reports, drawn as SVG by hand: small, without a script, readable in light and dark.

Letters: ``n`` bars. Coordinates are whole pixels, so that 500 charts fit into one page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from os.path import commonprefix

import numpy as np
import numpy.typing as npt

BARS, BAR_WIDTH = 96, 5
LEFT, RIGHT, BOTTOM = 68, 12, 24
PLOT, LANE = 140, 13
LABEL = 38
"""Characters of a name that find room beside its bar."""
WIDTH = LEFT + BARS * BAR_WIDTH + RIGHT
COLOURS = ("#d1495b", "#2a9d4a", "#c77700", "#7b4fc9", "#0f8b8d", "#b23a9b")
"""Of ranges, in order; all stand out from the blue bars, on white and on a dark ground."""

F64 = npt.NDArray[np.float64]


def histogram_svg(
    edges: npt.ArrayLike, counts: npt.ArrayLike, ranges: Mapping[str, tuple[float, float]] | None = None
) -> str:
    """Draw how often values occur, on a logarithmic scale, with ranges that were chosen for them above.

    Args:
        edges: Borders of the bars, ascending [n + 1]; or their middles [n].
        counts: How many values fell into each bar [n].
        ranges: Name -> lowest and highest value that is kept; what lies outside is clipped.

    Returns:
        An ``<svg>`` element; the page gives colours to its classes ``bar``, ``grid`` and ``tick``.
    """
    borders, heights = rebin(*_as_edges(np.asarray(edges, np.float64), np.asarray(counts, np.float64)), BARS)
    lo, hi = float(borders[0]), float(borders[-1])
    chosen = dict(ranges or {})
    top = LANE * len(chosen) + 6
    decades = max(1, math.ceil(math.log10(float(heights.max()) + 1)))
    levels = np.rint(np.log10(np.maximum(heights, 0) + 1) / decades * PLOT).astype(int)
    parts = [*_decades(decades, top), _bars(levels, top + PLOT), *_ticks(lo, hi, top + PLOT)]
    for lane, (name, limits) in enumerate(chosen.items()):
        parts.append(_range(name, limits, lane, ((lo, hi), top + PLOT)))
    return _svg(top + PLOT + BOTTOM, parts)


def rebin(edges: F64, counts: F64, bars: int) -> tuple[F64, F64]:
    """Return ``bars`` bars of equal width over the same interval; counts spread evenly inside a bar.

    Args:
        edges: Ascending [n + 1].
        counts: [n].
        bars: How many bars. Where the interval has no width worth dividing, all is in the middle one.
    """
    if edges[-1] - edges[0] <= max(1e-300, 1e-12 * float(np.abs(edges[[0, -1]]).max())):
        middle = float(edges[0])
        reach = abs(middle) / 2 or 0.5
        wide = np.linspace(middle - reach, middle + reach, bars + 1)
        return wide, np.where(np.arange(bars) == bars // 2, counts.sum(), 0.0)
    seen = np.concatenate([[0.0], np.cumsum(counts)])
    wide = np.linspace(edges[0], edges[-1], bars + 1)
    return wide, np.diff(np.interp(wide, edges, seen))


def bars_svg(names: Sequence[str], values: Sequence[float], unit: str = "") -> str:
    """Draw one horizontal bar per name, the longest over the whole width.

    Args:
        names: Labels; escaped here.
        values: One per name, not negative; what is not finite has no bar.
        unit: Printed behind every value.
    """
    row, label, reach = 17, 230, WIDTH - 230 - 62
    longest = max((v for v in values if math.isfinite(v)), default=1.0) or 1.0
    shared = commonprefix([name for name in names if len(name) > LABEL])  # noqa: RUF071 - names are no paths
    shared = shared[: max(shared.rfind("."), shared.rfind("/")) + 1]
    parts = []
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        y = index * row + 2
        length = round(reach * max(value, 0) / longest) if math.isfinite(value) else 0
        shown = name if len(name) <= LABEL else f"…{name.removeprefix(shared)}"
        shown = shown if len(shown) <= LABEL else f"{shown[: LABEL // 2 - 1]}…{shown[-LABEL // 2 :]}"
        parts.append(
            f"<g><title>{escape(name)}</title>"
            f'<text class="tick" x="{label - 6}" y="{y + 10}" text-anchor="end">{escape(shown)}</text>'
            f'<rect class="bar" x="{label}" y="{y}" width="{length}" height="12"/>'
            f'<text class="tick" x="{label + length + 5}" y="{y + 10}">{value:.3g}{escape(unit)}</text></g>'
        )
    return _svg(row * len(names) + 4, parts)


def _svg(height: int, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    return "".join([head, *parts, "</svg>"])


def _as_edges(edges: F64, counts: F64) -> tuple[F64, F64]:
    if len(counts) == 0:
        return np.array([-1.0, 1.0]), np.zeros(1)
    if len(edges) == len(counts) + 1:
        return edges, counts
    if len(edges) != len(counts):
        raise ValueError(f"{len(edges)} edges for {len(counts)} counts")
    between = (edges[1:] + edges[:-1]) / 2
    return np.concatenate([edges[:1], between, edges[-1:]]), counts


def _bars(levels: npt.NDArray[np.int_], floor: int) -> str:
    """Return all bars as one closed outline: every step is relative to the last."""
    steps = [f"M{LEFT} {floor}"]
    width, last = 0, 0
    for level in levels.tolist():
        if level != last:
            steps.append(f"h{width}v{last - level}" if width else f"v{last - level}")
            width, last = 0, level
        width += BAR_WIDTH
    return f'<path class="bar" d="{"".join(steps)}h{width}V{floor}z"/>'


def _decades(decades: int, top: int) -> list[str]:
    parts, lines = [], []
    for power in range(0, decades + 1, max(1, round(decades / 4))):
        # One is added to every count, so that 0 has a place.
        y = top + PLOT - round(PLOT * math.log10((10**power if power else 0) + 1) / decades)
        y = max(y, top)
        label = f"10<tspan dy='-4' font-size='8'>{power}</tspan>" if power else "0"
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3}" text-anchor="end">{label}</text>')
        lines.append(f"M{LEFT} {y}H{WIDTH - RIGHT}")
    return [f'<path class="grid" d="{"".join(lines)}"/>', *parts]


def _x(value: float, span: tuple[float, float]) -> int:
    lo, hi = span
    return LEFT + round((min(max(value, lo), hi) - lo) / (hi - lo) * BARS * BAR_WIDTH)


def _ticks(lo: float, hi: float, floor: int) -> list[str]:
    step = 10.0 ** math.floor(math.log10(hi - lo))
    step = next(step * factor for factor in (0.2, 0.5, 1, 2, 5) if (hi - lo) / (step * factor) <= 6)
    parts, lines = [], []
    for index in range(math.ceil(lo / step), math.floor(hi / step) + 1):
        at = _x(index * step, (lo, hi))
        lines.append(f"M{at} {floor}v4")
        label = f"{index * step:.6g}"
        parts.append(f'<text class="tick" x="{at}" y="{floor + 15}" text-anchor="middle">{label}</text>')
    return [f'<path class="grid" d="{"".join(lines)}"/>', *parts]


def _range(name: str, limits: tuple[float, float], lane: int, plot: tuple[tuple[float, float], int]) -> str:
    """Return a bracket in its own lane above the bars, with its ends drawn down through them."""
    span, floor = plot
    colour = COLOURS[lane % len(COLOURS)]
    low, high = (_x(value, span) for value in limits)
    y = 5 + LANE * lane
    return (
        f'<g fill="none" stroke="{colour}"><title>{escape(name)}: {limits[0]:.4g} to {limits[1]:.4g}</title>'
        f'<path d="M{low} {y + 4}V{y}H{high}v4" stroke-width="2"/>'
        f'<path d="M{low} {y + 4}V{floor}M{high} {y + 4}V{floor}" stroke-dasharray="3"/>'
        f'<text x="{LEFT - 6}" y="{y + 4}" font-size="10" text-anchor="end" stroke="none" fill="{colour}">'
        f"{escape(name[:12])}</text></g>"
    )
