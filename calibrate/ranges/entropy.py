"""Entropy: the clipping threshold that loses least information (Kullback-Leibler divergence).

Letters: ``b`` uniform bins of the magnitudes, ``L`` codes that a magnitude can take, ``k`` candidate thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..qarray import Range, Spec
from ..stats.histogram import F64, I64, Histogram
from . import METHODS
from .error import grid

_MIN_BINS, _MAX_BINS = 2048, 65536
_BULK = 0.99
_BINS_PER_CODE = 16  # within the bulk, so that a far outlier does not blur it
_CANDIDATES = 256
_MAX_CODES = 1024


@dataclass(frozen=True, slots=True)
class Entropy:
    """What: the threshold whose quantized distribution of magnitudes has the smallest KL divergence from the original.

    The histogram is rebuilt in 2048 to 65,536 uniform bins, by the spread of the data. For each threshold the
    magnitudes beyond it are added to the last bin of the reference; the candidate distribution is what remains when
    every code spreads its count evenly over its non-empty bins. Zeros are left out: every range holds them exactly.
    Both ends are clipped at the same magnitude. Formats of more than 1024 codes per sign get the full range, because
    they resolve more than any histogram.

    When to use: convolutional networks with 8-bit activations; what TensorRT users expect.
    Options: none.
    Source: Migacz, "8-bit inference with TensorRT", GTC 2017, slides 21-38.
    """

    def __call__(self, histogram: Histogram, spec: Spec) -> Range:
        """Return the range of least divergence."""
        fractions = _code_edges(histogram, spec)
        limit = histogram.amax
        if histogram.finite > histogram.zero and len(fractions) <= _MAX_CODES:
            counts, beyond, reach = _uniform_counts(histogram, len(fractions) - 1)
            limit = reach * _best_threshold(counts, beyond, fractions) / len(counts)
        return Range.of(max(histogram.lo, -limit), min(histogram.hi, limit))


def _code_edges(histogram: Histogram, spec: Spec) -> F64:
    """Return where the codes of magnitudes begin and end, [L + 1], as fractions of the largest magnitude."""
    if not spec.format.is_integer:
        levels, between, _ = grid(spec.format)
        return np.concatenate([[0.0], between[between > 0] / levels[-1], [1.0]])
    if spec.symmetric:
        codes = min(spec.middle - spec.qmin, spec.qmax - spec.middle) + 1
    else:
        lo, hi = min(histogram.lo, 0.0), max(histogram.hi, 0.0)
        share = histogram.amax / (hi - lo) if hi > lo else 1.0
        codes = max(round((spec.qmax - spec.qmin + 1) * share), 2)
    return np.linspace(0.0, 1.0, int(codes) + 1)


def _uniform_counts(histogram: Histogram, codes: int) -> tuple[F64, float, float]:
    """Return the counts of the non-zero magnitudes in uniform bins [b], what lies beyond, and where the bins end.

    They end at the largest magnitude, or earlier where so many bins would not resolve the bulk of the data.
    """
    bins = histogram.absolute().bins()
    keep = bins.center > 0
    edges = np.stack([bins.low[keep], bins.high[keep]], axis=1).reshape(-1)
    seen = np.cumsum(bins.counts[keep])
    bulk = float(bins.high[keep][np.searchsorted(seen, _BULK * seen[-1])])
    reach = min(histogram.amax, bulk * _MAX_BINS / (_BINS_PER_CODE * codes))
    size = max(_MIN_BINS, 1 << (int(_BINS_PER_CODE * codes * reach / bulk) - 1).bit_length())
    cumulative = np.stack([np.append(0.0, seen[:-1]), seen], axis=1).reshape(-1)
    at_edges = np.interp(np.linspace(0.0, reach, size + 1), edges, cumulative)
    return np.maximum(np.diff(at_edges), 0.0), float(seen[-1] - at_edges[-1]), reach


def _best_threshold(counts: F64, beyond: float, fractions: F64) -> int:
    """Return the number of bins to keep, of ``counts [b]``, for codes that end at ``fractions [L + 1]``."""
    first, last = min(len(fractions) - 1, len(counts)), len(counts)
    spacing = max((last - first) // _CANDIDATES, 1)
    coarse = np.append(np.arange(first, last, spacing), last)[::-1]
    best = int(coarse[np.argmin(divergence(counts, beyond, coarse, fractions))])
    near = np.arange(min(best + spacing, last), max(best - spacing, first) - 1, -1)
    return int(near[np.argmin(divergence(counts, beyond, near, fractions))])


def divergence(counts: F64, beyond: float, thresholds: I64, fractions: F64) -> F64:
    """Return the KL divergence in nats for each of several thresholds, [k].

    With prefix sums of ``p``, ``p log p`` and of the number of non-empty bins, a threshold costs one look-up per code
    instead of a pass over the bins.

    Args:
        counts: Reference distribution p, not normalised, [b].
        beyond: Count of what lies beyond the bins.
        thresholds: Numbers of bins kept, each from 1 to b, [k].
        fractions: Ends of the codes as fractions of the threshold, ascending from 0 to 1, [L + 1].
    """
    mass, filled, own = (np.append(0.0, np.cumsum(v)) for v in (counts, counts > 0, _xlogx(counts)))
    edges = np.rint(fractions * thresholds[:, None]).astype(np.int64)
    sums, sizes = np.diff(mass[edges]), np.diff(filled[edges])
    code_logs = np.log(np.where(sums > 0, sums, 1.0) / np.maximum(sizes, 1.0))
    kept, last = mass[thresholds], counts[thresholds - 1]
    everything = mass[-1] + beyond
    clipped = everything - kept
    reference = own[thresholds - 1] + _xlogx(last + clipped)
    final = np.take_along_axis(code_logs, _last_filled(edges)[:, None], axis=1)[:, 0]
    cross = (sums * code_logs).sum(axis=1) + clipped * final
    with np.errstate(divide="ignore"):
        nats = (reference - cross) / everything - np.log(everything) + np.log(kept)
    # Where the last bin is empty, the clipped values would fall where the candidate has nothing: infinitely far.
    return np.where((last <= 0) & (clipped > 0), np.inf, nats)


def _last_filled(edges: I64) -> I64:
    """Return the index of the last code that spans at least one bin, for each row of ``edges [k, L + 1]``."""
    spans = np.diff(edges) > 0
    return np.asarray(spans.shape[1] - 1 - np.argmax(spans[:, ::-1], axis=1))


def _xlogx(x: F64) -> F64:
    return np.asarray(x * np.log(np.where(x > 0, x, 1.0)))


METHODS.add("entropy", Entropy())
