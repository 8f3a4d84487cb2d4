"""Clip search: how far to pull in the range of each scale so that the error is smallest, for the very format in use.

Clipping the few largest weights costs something, but makes the step finer for all others that share the scale.

Letters: ``out``, ``in`` dimensions of a weight, ``g`` its number of scales, ``e`` how many weights share one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..qarray import Range, Spec, fake_quant, minmax_range, params_from_range
from .groups import chunks, from_groups, row_spec, to_groups

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
Rows = slice | npt.NDArray[np.intp]
Error = Callable[[F32, Rows], Array]
Clipping = Callable[[F32, F32, Rows], Array]

CANDIDATES = 24


def search_clip(
    x: F32, spec: Spec, error: Error, candidates: int = CANDIDATES, *, at_least: Clipping | None = None
) -> Range:
    """Return, for every row, the range with the smallest error.

    What is clipped grows as ranges shrink. So a row whose clipping alone costs more than the best range is done, which
    leaves a third of the work where errors of single weights add up.

    Args:
        x: Values [g, e].
        spec: Format, with one scale per row.
        error: Maps the differences [n, e] of the rows with these numbers [n] to their cost [n].
        candidates: Ranges to try, from the full one down to 0.3 of it; and twice the full one, for scales that are
            stored as powers of two. Among equals the wider one wins.
        at_least: Maps what the smallest and the largest values of the rows lose by clipping, both [n, 1] and >= 0, and
            the numbers of the rows to a cost [n, 1] below which theirs cannot fall; None where no such is known.
    """
    full = minmax_range(x, spec.granularity)
    best = np.ones_like(full.lo)
    rows: Rows = slice(None)
    lo, hi, ratios, least = full.lo, full.hi, best, np.full(full.lo.shape, np.inf)
    for ratio in np.array([1.0, 2.0, *np.linspace(1.0, 0.3, int(candidates))[1:]], np.float32):
        params = params_from_range(Range(lo=lo * ratio, hi=hi * ratio), spec)
        cost = error(fake_quant(x, params) - x, rows)[:, None]
        better = cost < least
        np.copyto(least, cost, where=better)
        np.copyto(ratios, ratio, where=better)
        if at_least is None or ratio >= 1:
            continue
        lowest, highest = (fake_quant(np.full_like(lo, side), params) for side in (-np.inf, np.inf))
        clipped = at_least(np.maximum(lowest - lo, 0), np.maximum(hi - highest, 0), rows)
        unsettled = np.flatnonzero(clipped < least)
        if len(unsettled) < _WORTH_COPYING * len(x):
            best[rows] = ratios
            rows = np.arange(len(best))[rows][unsettled]
            x, lo, hi, ratios, least = (part[unsettled] for part in (x, lo, hi, ratios, least))
        if not len(x):
            break
    best[rows] = ratios
    return Range(lo=full.lo * best, hi=full.hi * best)


_WORTH_COPYING = 0.9
"""Share of the rows that must be left for them not to be copied together."""


def mse_range(w: Array, spec: Spec, importance: Array | None = None, candidates: int = CANDIDATES) -> Range:
    """Return the range per scale with the smallest squared error.

    Args:
        w: Weight [out, in].
        spec: How it is to be quantized.
        importance: Weight of the squared error of each input channel [in], >= 0; None for equal weights.
        candidates: Ranges to try, see `search_clip`.
    """
    granularity = spec.granularity
    groups = to_groups(np.asarray(w, dtype=np.float32), granularity)
    weights = None if importance is None else to_groups(np.broadcast_to(_relative(importance), w.shape), granularity)
    found = [
        _search(groups[rows], row_spec(spec), None if weights is None else weights[rows], candidates)
        for rows in chunks(groups)
    ]
    lo, hi = (np.concatenate(bounds) for bounds in zip(*((r.lo, r.hi) for r in found), strict=True))
    shape = (w.shape[0], w.shape[1])
    return Range(lo=from_groups(lo, granularity, shape), hi=from_groups(hi, granularity, shape))


def _search(x: F32, spec: Spec, weights: F32 | None, candidates: int) -> Range:
    """Return the range of each row of ``x`` [g, e] with the smallest squared error, ``weights`` [g, e] counted in."""
    if weights is None:
        return search_clip(
            x,
            spec,
            lambda d, _: np.asarray(np.einsum("ge,ge->g", d, d)),
            candidates,
            at_least=lambda lo, hi, _: lo * lo + hi * hi,
        )
    ends = [np.take_along_axis(weights, end[:, None], axis=1) for end in (x.argmin(axis=1), x.argmax(axis=1))]
    return search_clip(
        x,
        spec,
        lambda d, rows: np.asarray(np.einsum("ge,ge,ge->g", d, d, weights[rows])),
        candidates,
        at_least=lambda lo, hi, rows: ends[0][rows] * lo * lo + ends[1][rows] * hi * hi,
    )


def _relative(importance: Array) -> F32:
    """Scale to a mean of 1, lest squares leave float32; all zero means nothing is known."""
    mean = float(importance.mean()) if importance.size else 0.0
    return np.asarray(importance / mean if mean > 0 else np.ones_like(importance), dtype=np.float32)
