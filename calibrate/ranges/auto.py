"""Auto: the method that suits the tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..qarray import Range, Spec
from ..stats.histogram import Histogram
from . import METHODS
from .error import expected_mses

_TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class Auto:
    """What: per tensor the method whose expected quantization error for the format in use is smallest.

    Methods whose error is within a tolerance of the smallest count as equal, and the one that clips least wins: a
    search over calibration data should not clip what new data may hold, unless that buys something.

    When to use: when tensors differ (outliers here, one-sided there) and nothing is known about them.
    Options: tolerance, the relative excess error that counts as equal, 0.01 unless given.
    Source: own; the error model is that of `expected_mse`.
    """

    tolerance: float = _TOLERANCE

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ValueError("a tolerance is 0 or more")

    def __call__(self, histogram: Histogram, spec: Spec) -> Range:
        """Return the range of the chosen method."""
        return choose(histogram, spec, self.tolerance)[1]


def choose(histogram: Histogram, spec: Spec, tolerance: float = _TOLERANCE) -> tuple[str, Range]:
    """Return the name of the method that `Auto` picks for a tensor, and its range."""
    ranges = {name: method(histogram, spec) for name, method in METHODS.items() if not isinstance(method, Auto)}
    name = pick(ranges, histogram, spec, tolerance)
    return name, ranges[name]


def pick(ranges: Mapping[str, Range], histogram: Histogram, spec: Spec, tolerance: float = _TOLERANCE) -> str:
    """Return which of several ranges of a tensor, by method, `Auto` takes."""
    errors = dict(zip(ranges, expected_mses(histogram, list(ranges.values()), spec), strict=True))
    enough = min(errors.values()) * (1 + tolerance)
    good = [name for name in ranges if errors[name] <= enough]
    return max(good, key=lambda n: (float(ranges[n].hi - ranges[n].lo), n == "minmax"))


METHODS.add("auto", Auto())
