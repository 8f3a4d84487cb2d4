"""Min-max: the range is what was seen."""

from __future__ import annotations

from dataclasses import dataclass

from ..qarray import Range, Spec
from ..stats.histogram import Histogram
from . import METHODS


@dataclass(frozen=True, slots=True)
class MinMax:
    """What: the exact smallest and largest value; nothing is clipped.

    The mean of every batch's minimum and maximum, which some tools offer, is left out: it depends on how the data was
    cut into batches, so that no statistics that merge exactly can hold it; ``percentile`` clips by a stated share.

    When to use: activations without outliers, formats with many codes (int16, float8), weights.
    Options: none.
    Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", section 3.1.2 (2018).
    """

    def __call__(self, histogram: Histogram, spec: Spec) -> Range:  # noqa: ARG002 - the same for every format
        """Return ``[lo, hi]`` of ``histogram``, widened to contain 0."""
        return Range.of(histogram.lo, histogram.hi)


METHODS.add("minmax", MinMax())
