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
Error = Callable[[F32], Array]

CANDIDATES = 24


def search_clip(x: F32, spec: Spec, error: Error, candidates: int = CANDIDATES) -> Range:
    """Return, for every scale at once, the range with the smallest error.

    Args:
        x: Values [shape].
        spec: Format, and the granularity of x.
        error: Maps a difference [shape] to a cost per scale, [scale_shape].
        candidates: Ranges to try, from the full one down to 0.3 of it; and twice the full one, for scales that are
            stored as powers of two. Among equals the wider one wins.
    """
    full = minmax_range(x, spec.granularity)
    best = full
    least = np.full(full.lo.shape, np.inf)
    for ratio in (*np.linspace(1.0, 0.3, int(candidates)), 2.0):
        tried = Range(lo=full.lo * np.float32(ratio), hi=full.hi * np.float32(ratio))
        cost = error(fake_quant(x, params_from_range(tried, spec)) - x)
        better = cost < least
        least = np.where(better, cost, least)
        best = Range(lo=np.where(better, tried.lo, best.lo), hi=np.where(better, tried.hi, best.hi))
    return best


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
    costs = np.ones(1, np.float32) if importance is None else _relative(importance)
    weights = to_groups(np.broadcast_to(costs, w.shape), granularity)

    def search(rows: slice) -> Range:
        return search_clip(
            groups[rows],
            row_spec(spec),
            lambda d: np.asarray(np.einsum("ge,ge,ge->g", d, d, weights[rows]))[:, None],
            candidates,
        )

    found = [search(rows) for rows in chunks(groups)]
    lo, hi = (np.concatenate(bounds) for bounds in zip(*((r.lo, r.hi) for r in found), strict=True))
    shape = (w.shape[0], w.shape[1])
    return Range(lo=from_groups(lo, granularity, shape), hi=from_groups(hi, granularity, shape))


def _relative(importance: Array) -> F32:
    """Scale to a mean of 1, lest squares leave float32; all zero means nothing is known."""
    mean = float(importance.mean()) if importance.size else 0.0
    return np.asarray(importance / mean if mean > 0 else np.ones_like(importance), dtype=np.float32)
