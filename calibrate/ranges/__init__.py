"""Calibration methods: a `RangeMethod` turns a tensor's statistics and a `Spec` into a `Range`.

All methods are solved from the same `Histogram`, so that choosing another one needs no second run of the model.
A method is a frozen dataclass whose fields are its options: ``percentile:99.9`` sets the first field of
`METHODS.get("percentile")` to 99.9.
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


def resolve(text: str) -> RangeMethod:
    """Return the method that ``text`` names, with its option set.

    Args:
        text: A registered name, or ``name:number`` for a method that has an option, e.g. ``"percentile:99.99"``.

    Raises:
        RecipeError: No such method, a method without options, or a value that the option does not take.
    """
    return METHODS.resolve(text)
