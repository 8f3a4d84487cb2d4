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

from collections.abc import Callable
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

    The weights' part is exact on the calibration data. The activations' part takes rounding errors as independent of
    each other: step^2 / 12 each, with the step of the widest channel, and no more than the channel's own energy.

    Args:
        w: Weight [out, in].
        spec: How it is quantized.
        stats: `gram` and `channels` of its input.
        x_spec: How its input is quantized, with one scale; None when it stays float.
        method: What quantizes the weight.
    """
    gram = gram_of("the search of an equalizer", w, stats)
    rounded = dequantize(method(w, spec, stats))
    error = output_mse(w, rounded, gram)
    if x_spec is None:
        return error
    step = 2 * float(channels_of("the search of an equalizer", w, stats).amax.max()) / (x_spec.qmax - x_spec.qmin)
    noise = np.minimum(step**2 / 12, np.diag(gram.matrix) / max(gram.tokens, 1))
    return error + float(np.square(rounded.astype(np.float64)).sum(axis=0) @ noise) / max(len(w), 1)


def best_scale(candidates: list[F32], cost: Callable[[F32], float]) -> F32:
    """Return the candidate scale [in] with the smallest cost; among equals the first."""
    costs = [cost(scale) for scale in candidates]
    return candidates[int(np.argmin(costs))]


def bounded(scale: Array, live: Array) -> F32:
    """Return ``scale`` [in] within `LIMIT`, and 1 where a channel is not ``live`` [in]."""
    with np.errstate(invalid="ignore"):
        return np.where(live, np.clip(scale, 1 / LIMIT, LIMIT), 1).astype(np.float32)
