"""Round to nearest: every weight goes to its nearest code; all there is to choose is the scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy.typing as npt

from ..qarray import QArray, Spec, minmax_range, params_from_range, quantize
from . import WEIGHT_METHODS, WeightStats
from .pairs import pair_safe
from .search import CANDIDATES, mse_range

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Rtn:
    """What: round to nearest, with scales that just hold the smallest and the largest weight. Nothing is clipped.

    When to use: 8 bits per channel, where clipping gains next to nothing, and as the yardstick of the others.
    Options: none.
    Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", section 2 (2018).
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, w: Array, spec: Spec, stats: WeightStats | None = None) -> QArray:  # noqa: ARG002 - protocol
        """Return the codes of ``w`` [out, in]; ``stats`` are not looked at."""
        if spec.pair_limit:
            return pair_safe(w, spec)
        return quantize(w, params_from_range(minmax_range(w, spec.granularity), spec))


@dataclass(frozen=True, slots=True)
class RtnMse:
    """What: round to nearest, with the clipped range whose squared error is smallest, per scale and for the format.

    With statistics, a weight's error counts as much as the energy of the input that it meets: the expected output
    error if rounding errors were uncorrelated.

    When to use: below 8 bits whenever nothing better can be had; costs 25 times as much as min-max, still seconds.
    Options: candidates, ranges to try, from the full one down to 0.3 of it.
    Source: Banner et al., "Post training 4-bit quantization of convolutional networks", section 3 (2019); Nagel et
        al., "A white paper on neural network quantization", section 3.1 (2021).
    """

    candidates: int = CANDIDATES

    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not self.candidates >= 1:
            raise ValueError("candidates are 1 or more")

    def __call__(self, w: Array, spec: Spec, stats: WeightStats | None = None) -> QArray:
        """Return the codes of ``w`` [out, in]."""
        energy = None if stats is None else stats.energy
        if spec.pair_limit:
            return pair_safe(w, spec, energy)
        return quantize(w, params_from_range(mse_range(w, spec, energy, self.candidates), spec))


WEIGHT_METHODS.add("rtn", Rtn())
WEIGHT_METHODS.add("rtn_mse", RtnMse())
