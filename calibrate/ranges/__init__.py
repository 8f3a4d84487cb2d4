"""Calibration methods: a `RangeMethod` turns a tensor's statistics and a `Spec` into a `Range`.

All methods are solved from the same `Histogram`, so that choosing another one needs no second run of the model.
"""

from __future__ import annotations

from typing import Protocol

from ..qarray import Range, Spec
from ..registry import Registry
from ..stats.histogram import Histogram


class RangeMethod(Protocol):
    """A calibration method, registered under its name; its docstring says What / When to use / Options / Source."""

    def __call__(self, histogram: Histogram, spec: Spec) -> Range:
        """Return the range of one tensor (per-tensor granularity) for the format and symmetry in ``spec``."""
        ...


METHODS: Registry[RangeMethod] = Registry("calibration method", __name__)
