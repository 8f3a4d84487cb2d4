"""What a channel scale costs a layer, for many scales of one layer.

Letters: ``out``, ``in`` dimensions of the weight.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..qarray import Spec, dequantize
from ..weights import WeightStats
from ..weights.rtn import Rtn
from . import channels_of, input_energy, input_noise

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_BLOCK = 2**16
"""Weights rounded at a time: they and what is computed of them stay in a core's cache."""
_COLUMNS = 32
"""Columns turned at a time."""


class LayerErrors:
    """Expected squared errors of a layer's output, by channel scale.

    The errors are those of `error_parts`, with weights rounded to nearest, but for two things: what a pair limit adds
    is left out, as it meets all scales alike; and errors of activations meet the weights as they were before rounding.

    Args:
        w: Weight [out, in].
        spec: How it is quantized.
        stats: `channels` of its input; a Gram matrix is not looked at.
        x_spec: How its input is quantized, with one scale; None when it stays float.

    Attributes:
        w_amax: Largest magnitude of each column of the weight, [in].
        x_amax: Largest magnitude of each channel of its input, [in].
    """

    def __init__(self, w: Array, spec: Spec, stats: WeightStats, x_spec: Spec | None) -> None:
        self._w, self._spec, self._x_spec = w, spec, x_spec
        channels = channels_of("the search of an equalizer", w, stats)
        self._stats = WeightStats(channels=channels, lo=stats.lo, hi=stats.hi)
        self._sizes = _magnitudes(w)
        self._squares: F32 = np.einsum("oi,oi->i", self._sizes, self._sizes)
        self._known: dict[bytes, float] = {}
        self.w_amax: F32 = self._sizes.max(axis=0, initial=0)
        self.x_amax: F32 = channels.amax

    def total(self, scale: F32, weight_factor: float = 1.0, enough: float = math.inf) -> float:
        """Return the error where the input is divided, and the weight multiplied, by ``scale`` [in].

        Args:
            scale: The channel scale.
            weight_factor: How often the part counts that rounding the weights adds.
            enough: Where the part of the activations alone, which is soon known, reaches this, it is returned.
        """
        inputs = self._of_inputs(scale)
        return inputs if inputs >= enough else inputs + weight_factor * self._of_weights(scale)

    def _of_inputs(self, scale: F32) -> float:
        if self._x_spec is None:
            return 0.0
        stats = self._stats.scaled(scale)
        squares = self._squares * np.square(scale, dtype=np.float64)
        return float(squares @ input_noise(input_energy(self._w, stats), stats, self._x_spec)) / max(len(self._w), 1)

    def _of_weights(self, scale: F32) -> float:
        key = scale.tobytes()
        if key not in self._known:
            is_direct = self._spec.symmetric and self._spec.format.is_integer and not self._spec.granularity.block_size
            sums = self._rounded(scale) if is_direct else self._coded(scale)
            energy = input_energy(self._w, self._stats.scaled(scale))
            self._known[key] = float(sums @ energy) / max(len(self._w), 1)
        return self._known[key]

    def _coded(self, scale: F32) -> F64:
        """Return the sum of the squared errors of each column of the multiplied weight, [in]."""
        scaled = self._w * scale
        return np.asarray(np.square(dequantize(Rtn()(scaled, self._spec)) - scaled).sum(axis=0, dtype=np.float64))

    def _rounded(self, scale: F32) -> F64:
        """Return what `_coded` does for symmetric integers, without making codes: the sign does not matter to them."""
        total, rows = np.zeros(len(scale)), max(1, _BLOCK // max(len(scale), 1))
        scaled, codes = (np.empty((rows, len(scale)), np.float32) for _ in range(2))
        whole = (self.w_amax * scale).max(initial=0) if self._spec.granularity.axis is None else None
        for start in range(0, len(self._sizes), rows):
            block = self._sizes[start : start + rows]
            x, q = np.multiply(block, scale, out=scaled[: len(block)]), codes[: len(block)]
            largest = x.max(axis=1, initial=0, keepdims=True) if whole is None else whole
            steps = np.where(largest > 0, largest / np.float32(self._spec.span), np.float32(1))
            x *= 1 / steps
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
