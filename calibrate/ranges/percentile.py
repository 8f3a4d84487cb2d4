"""Percentile: clip a fixed share of the values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..qarray import Range, Spec
from ..stats.histogram import F64, Bins, Histogram
from . import METHODS


@dataclass(frozen=True, slots=True)
class Percentile:
    """What: the range that holds the given share of the values that are not zero; the rest is clipped.

    Symmetric specs take the percentile of the magnitudes; others take it from either end, so that up to twice the
    share is clipped. Zeros are left out because every range holds them exactly: a tensor that is almost all zeros
    (after ReLU, attention masks) would otherwise get an empty range.

    When to use: convolutional networks with few extreme activations; a quick fixed rule.
    Options: percentile, 99.99 unless given; above 0, at most 100, which is min-max exactly.
    Source: McKinstry et al., "Discovering low-precision networks close to full-precision networks", section 3 (2018);
        Wu et al., "Integer quantization for deep learning inference", section 4 (2020).
    """

    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise ValueError("a percentile is above 0 and at most 100")

    def __call__(self, histogram: Histogram, spec: Spec) -> Range:
        """Return the range of the values of ``histogram`` between the percentiles."""
        if self.percentile == 100:
            return Range.of(histogram.lo, histogram.hi)
        share = self.percentile / 100
        if spec.symmetric:
            limit = _quantile(histogram.absolute().bins(), share)
            return Range.of(max(histogram.lo, -limit), min(histogram.hi, limit))
        bins = histogram.bins()
        return Range.of(-_quantile(_mirror(bins), share), _quantile(bins, share))


def _mirror(bins: Bins) -> Bins:
    return Bins(-bins.high[::-1], -bins.low[::-1], -bins.center[::-1], bins.counts[::-1])


def _quantile(bins: Bins, share: float) -> float:
    """Return the smallest value with at least ``share`` of the non-zero counts at or below it, linear inside a bin."""
    bins = Bins(*(part[bins.center != 0] for part in bins))
    if not len(bins.counts):
        return 0.0
    seen: F64 = np.cumsum(bins.counts)
    wanted = share * seen[-1]
    k = min(int(np.searchsorted(seen, wanted)), len(seen) - 1)
    inside = (wanted - (seen[k] - bins.counts[k])) / bins.counts[k]
    return float(bins.low[k] + min(inside, 1.0) * (bins.high[k] - bins.low[k]))


METHODS.add("percentile", Percentile())
