"""One given range for every weight: what "one scale for the whole model" means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..qarray import QArray, Range, Spec, params_from_range, quantize
from . import WEIGHT_METHODS, WeightStats
from .pairs import limit_pairs

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Fixed:
    """What: round to nearest over the range -amax..amax, whatever the weight's own range is; beyond it saturates.

    When to use: as a baseline: with the largest weight of a whole model as ``amax`` all its weights share one scale.
    Options: amax, the largest magnitude that has a code; 0 stands for the weight's own.
    Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", section 2 (2018).
    """

    amax: float = 0.0

    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not (np.isfinite(self.amax) and self.amax >= 0):
            raise ValueError("a finite number, 0 or more")

    def __call__(self, w: Array, spec: Spec, stats: WeightStats | None = None) -> QArray:  # noqa: ARG002 - protocol
        """Return the codes of ``w`` [out, in]; ``stats`` are not looked at."""
        amax = self.amax or float(np.abs(w).max(initial=0.0))
        shape = spec.granularity.scale_shape(w.shape)
        rng = Range.of(np.full(shape, -amax), np.full(shape, amax))
        rounded = quantize(w, params_from_range(rng, spec))
        if not spec.pair_limit:
            return rounded
        return QArray(q=limit_pairs(rounded.q, spec.pair_limit), params=rounded.params)


WEIGHT_METHODS.add("fixed", Fixed())
