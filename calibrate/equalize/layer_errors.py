"""What a channel scale costs a layer, for many scales of one layer.

Letters: ``out``, ``in`` dimensions of the weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..qarray import Spec
from ..weights import WeightStats
from ..weights.rtn import Rtn
from . import error_parts, input_energy, input_noise

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_BLOCK = 2**16
"""Weights rounded at a time: they and what is computed of them stay in a core's cache."""
_COLUMNS = 32
"""Columns turned at a time."""


class LayerErrors:
    """Expected squared errors of a layer's output, by channel scale.

    The errors are those of `error_parts` with weights rounded to nearest. Symmetric integers are not made into codes
    for that: what the rounding of a weight is off by does not depend on its sign. What a pair limit adds is left out,
    as it meets all scales alike, and errors of activations meet the weights as they were before rounding.

    Args:
        w: Weight [out, in].
        spec: How it is quantized.
        stats: `channels` of its input; a Gram matrix is not looked at.
        x_spec: How its input is quantized, with one scale; None when it stays float.

    Attributes:
        amax: Largest magnitude of each column of the weight, [in].
    """

    def __init__(self, w: Array, spec: Spec, stats: WeightStats, x_spec: Spec | None) -> None:
        self._w, self._spec, self._x_spec = w, spec, x_spec
        self._stats = WeightStats(channels=stats.channels, lo=stats.lo, hi=stats.hi)
        self._sizes = _magnitudes(w)
        self.amax: F32 = self._sizes.max(axis=0, initial=0)
        self._squares: F32 = np.einsum("oi,oi->i", self._sizes, self._sizes)

    def parts(self, scale: F32) -> tuple[float, float]:
        """Return what rounding the weights adds, and what rounding the activations, where the input is divided.

        Args:
            scale: What the input is divided and the weight multiplied by, [in].
        """
        spec, stats = self._spec, self._stats.scaled(scale)
        if not (spec.symmetric and spec.format.is_integer) or spec.granularity.block_size:
            return error_parts(self._w * scale, spec, stats, self._x_spec, Rtn())
        count, energy = max(len(self._sizes), 1), input_energy(self._sizes, stats)
        weights = float(self._rounding(scale) @ energy) / count
        if self._x_spec is None:
            return weights, 0.0
        squares = self._squares * np.square(scale, dtype=np.float64)
        return weights, float(squares @ input_noise(energy, stats, self._x_spec)) / count

    def _rounding(self, scale: F32) -> F64:
        """Return the sum of the squared rounding errors of each column of the multiplied weight, [in]."""
        total, rows = np.zeros(len(scale)), max(1, _BLOCK // max(len(scale), 1))
        scaled, codes = (np.empty((rows, len(scale)), np.float32) for _ in range(2))
        whole = (self.amax * scale).max(initial=0) if self._spec.granularity.axis is None else None
        for start in range(0, len(self._sizes), rows):
            block = self._sizes[start : start + rows]
            x, q = np.multiply(block, scale, out=scaled[: len(block)]), codes[: len(block)]
            largest = x.max(axis=1, initial=0, keepdims=True) if whole is None else whole
            steps = np.where(largest > 0, largest / np.float32(self._spec.span), np.float32(1))
            x /= steps
            x -= np.rint(x, out=q)
            x *= steps
            total += np.einsum("oi,oi->i", x, x)
        return total


def _magnitudes(w: Array) -> F32:
    """Return ``|w|`` [out, in] in row-major order, a few columns at a time: most weights are stored [in, out]."""
    found = np.empty(w.shape, np.float32)
    for start in range(0, w.shape[1], _COLUMNS):
        found[:, start : start + _COLUMNS] = np.abs(w[:, start : start + _COLUMNS])
    return found
