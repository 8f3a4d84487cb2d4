"""Equalization: give each input channel a ``channel_scale [in]``; weights are multiplied by it, activations divided.

``y = x wᵀ = (x / s) (w s)ᵀ``: the float function stays what it was, and what is hard to quantize moves from activations
to weights (SmoothQuant), from important weights to others (AWQ), or from channel to channel (cross-layer).

For the layers that read one tensor (query, key and value, say) there is one scale: stack their weights along axis 0. ::

    equalizer = EQUALIZERS.resolve("smoothquant:0.5")         # or "smoothquant": alpha searched per layer
    equalizer.needs                                           # fields of WeightStats to collect
    s = equalizer(w, spec, stats, x_spec)                     # x_spec: how x is quantized, None when it stays float
    qarray = method(w * s, spec, stats.scaled(s))             # any weight method of qpipe.calibrate.weights

The caller folds ``1 / s`` into what makes x (the scale and bias of a LayerNorm, the rows and bias of a MatMul) or puts
a Mul in front. `cross_layer` looks at weights only and works on chains of layers; it stands apart from the registry.

Letters: ``out``, ``in`` dimensions of the weight.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..qarray import Spec, dequantize
from ..registry import Registry
from ..stats.channel_amax import ChannelAmax
from ..weights import WeightMethod, WeightStats, gram_of, output_mse

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_THREADS = 4

LIMIT = 1e4
"""Largest channel scale and inverse of the smallest: a channel that is nearly dead must not blow up its weights."""


class Equalizer(Protocol):
    """An equalizer: a frozen dataclass whose fields are its options, registered under its name.

    Its docstring says What / When to use / Options / Source.

    Attributes:
        needs: Fields of `WeightStats` without which it cannot work.
    """

    needs: ClassVar[frozenset[str]]

    def __call__(self, w: Array, spec: Spec, stats: WeightStats | None, x_spec: Spec | None) -> F32:
        """Return a channel scale.

        Args:
            w: Weight [out, in], or the weights of all layers that read the tensor, stacked along axis 0.
            spec: How the weight is to be quantized.
            stats: Statistics of the tensor.
            x_spec: How the tensor is to be quantized; None when it stays float.

        Returns:
            ``channel_scale`` [in], > 0; 1 for channels that were always zero.

        Raises:
            DataError: Statistics that it `needs` are missing or do not fit.
        """
        ...


EQUALIZERS: Registry[Equalizer] = Registry("equalizer", __name__)


def channels_of(equalizer: str, w: Array, stats: WeightStats | None) -> ChannelAmax:
    """Return the magnitudes per channel that ``equalizer`` needs for ``w`` [out, in].

    Raises:
        DataError: There are none, or of another number of channels.
    """
    expected = f"channels [{w.shape[1]}]"
    if stats is None or stats.channels is None:
        raise DataError(f"{equalizer} needs the magnitudes of the layer's input channels", expected=expected)
    if stats.channels.amax.shape != w.shape[1:]:
        found = str(list(stats.channels.amax.shape))
        raise DataError(f"{equalizer} cannot use these magnitudes", found=found, expected=expected)
    return stats.channels


def output_error(w: Array, spec: Spec, stats: WeightStats, x_spec: Spec | None, method: WeightMethod) -> float:
    """Return the expected squared error of the layer's output, per token and output channel.

    The weights' part is exact on the calibration data with its `gram`; with `channels` alone their errors count as
    independent of each other. So do those of activations: step^2 / 12 each, and no more than the channel's own energy.

    Args:
        w: Weight [out, in].
        spec: How it is quantized.
        stats: `channels` of its input, and its `gram` if it is known.
        x_spec: How its input is quantized, with one scale; None when it stays float.
        method: What quantizes the weight.
    """
    return sum(error_parts(w, spec, stats, x_spec, method))


def error_parts(
    w: Array, spec: Spec, stats: WeightStats, x_spec: Spec | None, method: WeightMethod
) -> tuple[float, float]:
    """Return the two parts of `output_error`: what rounding the weights adds, and what rounding the activations."""
    energy = input_energy(w, stats)
    rounded = dequantize(method(w, spec, stats))
    if stats.gram is not None:
        weights = output_mse(w, rounded, gram_of("the search of an equalizer", w, stats))
    else:
        weights = _weighed_mean_square(rounded - w, energy)
    if x_spec is None:
        return weights, 0.0
    return weights, _weighed_mean_square(rounded, input_noise(energy, stats, x_spec))


def _weighed_mean_square(rows: F32, weights: F64) -> float:
    """Return the sum over columns of ``rows [out, in]`` squared times ``weights [in]``, the mean over rows."""
    sums = np.square(rows).sum(axis=0)  # float32: exact to 1e-5, and three times as fast
    return float(sums.astype(np.float64) @ weights) / max(len(rows), 1)


def input_energy(w: Array, stats: WeightStats) -> F64:
    """Return the mean square of each channel of the input of ``w`` [out, in], as [in]."""
    channels = channels_of("the search of an equalizer", w, stats)
    return np.asarray(channels.energy / max(channels.tokens, 1))


def input_noise(energy: F64, stats: WeightStats, x_spec: Spec) -> F64:
    """Return the expected squared error of each channel of an input with one scale, [in]; at most its ``energy``."""
    lo, hi = stats.interval
    width = 2 * max(-lo, hi) if x_spec.symmetric else hi - lo
    return np.minimum((width / (x_spec.qmax - x_spec.qmin)) ** 2 / 12, energy)


def best_scale(candidates: list[F32], cost: Callable[[F32], float]) -> F32:
    """Return the candidate scale [in] with the smallest cost; among equals the first."""
    # numpy's loops let other threads run, and each needs a copy of the weight.
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return candidates[int(np.argmin(list(pool.map(cost, candidates))))]


def bounded(scale: Array, live: Array) -> F32:
    """Return ``scale`` [in] within `LIMIT`, and 1 where a channel is not ``live`` [in]."""
    with np.errstate(invalid="ignore"):
        return np.where(live, np.clip(scale, 1 / LIMIT, LIMIT), 1).astype(np.float32)
