"""MSE: the range with the smallest expected quantization error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..qarray import Range, Spec
from ..stats.histogram import F64, Histogram
from . import METHODS
from .error import Density

_OCTAVES = 16
_PER_OCTAVE = 2
_COARSENESS, _FINENESS = 3, 1  # of the bins; the error curve is flat around its minimum
_ROUNDS = 2
_POINTS = 9


@dataclass(frozen=True, slots=True)
class Mse:
    """What: the range whose mean squared quantization error, for the very format in use, is smallest.

    One bound is searched for symmetric specs, both in turn for others: from the full range down in half octaves
    over coarse bins, then twice more finely around the best over finer ones. It is never worse than min-max.

    When to use: the default; most of all below 8 bits, and where few values lie far out.
    Options: none.
    Source: Sung et al., "Resiliency of deep neural networks under quantization", section 3 (2015); Nagel et al.,
        "A white paper on neural network quantization", section 3.1 (2021).
    """

    def __call__(self, histogram: Histogram, spec: Spec) -> Range:
        """Return the range with the smallest `expected_mse`."""
        lo, hi, amax = min(histogram.lo, 0.0), max(histogram.hi, 0.0), histogram.amax

        def clipped(fraction: F64) -> Range:
            return Range.of(np.maximum(lo, -fraction * amax), np.minimum(hi, fraction * amax))

        search = _Search(histogram, spec)
        both = search.best(clipped)
        if spec.symmetric or not spec.format.is_integer or lo == 0 or hi == 0:
            return both
        low = float(both.lo)
        upper = search.best(lambda f: Range.of(np.full(f.shape, low), f * hi))
        high = float(upper.hi)
        return search.best(lambda f: Range.of(f * lo, np.full(f.shape, high)))


class _Search:
    """Finds the best of ``ranges(f)`` for fractions ``f [r]`` of the full range; among equals the widest."""

    def __init__(self, histogram: Histogram, spec: Spec) -> None:
        self._coarse = Density.of(histogram, _COARSENESS)
        self._fine = Density.of(histogram, _FINENESS)
        self._spec = spec

    def best(self, ranges: Callable[[F64], Range]) -> Range:
        """Return the best range, the full one if none is better."""
        fractions = 2.0 ** -(np.arange(_OCTAVES * _PER_OCTAVE) / _PER_OCTAVE)
        best = fractions[np.argmin(self._coarse.mse(ranges(fractions), self._spec))]
        spacing = 1 / _PER_OCTAVE
        for _ in range(_ROUNDS):
            around = np.minimum(best * 2.0 ** np.linspace(spacing, -spacing, _POINTS), 1.0)
            fractions = np.concatenate([[1.0], around])
            best = fractions[np.argmin(self._fine.mse(ranges(fractions), self._spec))]
            spacing /= _POINTS // 2
        return ranges(np.array(best))


METHODS.add("mse", Mse())
