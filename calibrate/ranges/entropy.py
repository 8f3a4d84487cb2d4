"""Entropy: the clipping threshold that loses least information (Kullback-Leibler divergence).

Letters: ``b`` uniform bins of the magnitudes, ``L`` codes that a magnitude can take, ``k`` candidate thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..qarray import Range, Spec
from ..stats.histogram import F64, I64, Histogram
from . import METHODS
from .error import grid

_MIN_BINS, _MAX_BINS = 2048, 32768
_BULK = 0.99
_BINS_PER_CODE = 8  # within the bulk, so that a far outlier does not blur it
_CANDIDATES = 128
_MAX_CODES = 1024


@dataclass(frozen=True, slots=True)
class Entropy:
    """What: the threshold whose quantized distribution of magnitudes has the smallest KL divergence from the original.

    The histogram is rebuilt in 2048 to 32,768 uniform bins, by the spread of the data. For each threshold the
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
            limit = reach * _best_threshold(Reference.of(counts, beyond), fractions) / len(counts)
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


def _best_threshold(reference: Reference, fractions: F64) -> int:
    """Return the number of bins to keep, for codes that end at ``fractions [L + 1]``."""
    last = len(reference.counts)
    low, high = min(len(fractions) - 1, last), last
    while True:
        spacing = max((high - low) // _CANDIDATES, 1)
        # The widest first: among equals nothing is clipped without need.
        thresholds = np.append(np.arange(low, high, spacing), high)[::-1]
        best = int(thresholds[np.argmin(divergence(reference, thresholds, fractions))])
        if spacing == 1:
            return best
        low, high = max(best - spacing, low), min(best + spacing, high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The original distribution p, not normalised, and its prefix sums.

    Attributes:
        counts: p, [b].
        mass: Sums of p before each bin, [b + 1].
        filled: Numbers of non-empty bins before each bin, [b + 1].
        own: Sums of p log p before each bin, [b + 1].
        total: Sum of p and of what lies beyond the bins.
    """

    counts: F64
    mass: F64
    filled: F64
    own: F64
    total: float

    @classmethod
    def of(cls, counts: F64, beyond: float) -> Reference:
        """Return the distribution with the given counts in its bins [b] and beyond them."""
        mass, filled, own = (np.append(0.0, np.cumsum(part)) for part in (counts, counts > 0, _xlogx(counts)))
        return cls(counts=counts, mass=mass, filled=filled, own=own, total=float(mass[-1]) + beyond)


def divergence(reference: Reference, thresholds: I64, fractions: F64) -> F64:
    """Return the KL divergence in nats for each of several thresholds, [k].

    With the prefix sums a threshold costs one look-up per code instead of a pass over the bins.

    Args:
        reference: The original distribution.
        thresholds: Numbers of bins kept, each from 1 to b, [k].
        fractions: Ends of the codes as fractions of the threshold, ascending from 0 to 1, [L + 1].
    """
    edges = np.rint(fractions * thresholds[:, None]).astype(np.intp)
    at_edges = reference.mass[edges]
    sums, sizes = np.diff(at_edges), np.diff(reference.filled[edges])
    code_logs = np.log(np.where(sums > 0, sums, 1.0) / np.maximum(sizes, 1.0))
    kept, last = at_edges[:, -1], reference.counts[thresholds - 1]
    clipped = reference.total - kept
    entropy = reference.own[thresholds - 1] + _xlogx(last + clipped)
    final = np.take_along_axis(code_logs, _last_filled(edges)[:, None], axis=1)[:, 0]
    cross = np.einsum("kl,kl->k", sums, code_logs) + clipped * final
    with np.errstate(divide="ignore"):
        nats = (entropy - cross) / reference.total - np.log(reference.total) + np.log(kept)
    # Where the last bin is empty, the clipped values would fall where the candidate has nothing: infinitely far.
    return np.where((last <= 0) & (clipped > 0), np.inf, nats)


def _last_filled(edges: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Return the index of the last code that spans at least one bin, for each row of ``edges [k, L + 1]``."""
    spans = np.diff(edges) > 0
    return np.asarray(spans.shape[1] - 1 - np.argmax(spans[:, ::-1], axis=1))


def _xlogx(x: F64) -> F64:
    return np.asarray(x * np.log(np.where(x > 0, x, 1.0)))


METHODS.add("entropy", Entropy())
