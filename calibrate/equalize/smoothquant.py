"""SmoothQuant: move the outliers of activations into the weights.

Letters: ``out``, ``in`` dimensions of the weight, ``j`` an input channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..qarray import Spec
from ..weights import WeightStats
from . import EQUALIZERS, bounded, channels_of
from .layer_errors import LayerErrors

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]

_ALPHAS = np.linspace(0, 1, 21)
_CEILINGS = 2.0 ** -np.arange(0.5, 4.1, 0.5)

_FIRST_CEILING, _FIRST_ALPHA = 2, 15
"""Places in both series, the first with no ceiling at 0, at which the search begins: most often the best is near."""
_FAR = 1.5
"""A series whose first error is so many times the best of the other is not followed: its errors change slowly."""

WEIGHT_ERROR = 2.0
"""How much an error of weights counts beside one of activations in the search.

Rounding errors of activations differ from token to token and average out wherever tokens are averaged, in attention and
pooling; those of weights are the same for all tokens. On MiniLM factors from 1 to 4 do alike, 16 is far worse.
"""


@dataclass(frozen=True, slots=True)
class SmoothQuant:
    """What: ``s_j = amax(x_j)^alpha / amax(w_j)^(1 - alpha)``.

    With alpha 1 all channels of x get one magnitude, with 0 all columns of w do; between, both get part of the burden.

    Without an alpha, 0 to 1 in steps of 0.05 are searched per layer; and ``s_j = max(1, amax(x_j) / c)`` for ceilings c
    from none over 0.7 to 0.06 of the largest magnitude, which touches only the channels that stick out, hence fewer
    weights. The smallest expected error of the output wins, with both x and w rounded as the specs say. In both series
    errors fall to one place and rise behind it, so that each is followed only while they fall.

    When to use: 8-bit activations with one scale per tensor in transformers, where a few channels are many times
        larger than the others.
    Options: alpha, the migration strength; the paper takes 0.5, and 0.75 and more for strong outliers.
    Source: Xiao et al., "SmoothQuant: accurate and efficient post-training quantization for large language models",
        equation 4 (2022).
    """

    alpha: float | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"channels"})

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError("alpha is between 0 and 1")

    def __call__(self, w: Array, spec: Spec, stats: WeightStats | None, x_spec: Spec | None) -> F32:
        """Return ``channel_scale`` [in] for ``w`` [out, in]."""
        channels = channels_of("smoothquant", w, stats)
        if self.alpha is not None:
            w_amax = np.abs(w).max(axis=0, initial=0)
            return _migrate(channels.amax.astype(np.float64), w_amax.astype(np.float64), self.alpha)
        assert stats is not None
        # Errors of weights count as independent: with the Gram matrix the choice is the same, and takes far longer.
        return search(LayerErrors(w, spec, stats, x_spec))


def search(errors: LayerErrors) -> F32:
    """Return the ``channel_scale`` [in] that `SmoothQuant` without an alpha finds for a layer."""
    ceilings, powers = both_series(errors)
    best, error = _lowest(ceilings, errors, _FIRST_CEILING)
    other, other_error = _lowest(powers, errors, _FIRST_ALPHA, _FAR * error)
    return best if error <= other_error else other


def both_series(errors: LayerErrors) -> tuple[list[F32], list[F32]]:
    """Return the scales [in] that may be chosen for a layer: by ceilings, from none on, and by powers of magnitudes."""
    x_amax, w_amax = errors.x_amax.astype(np.float64), errors.w_amax.astype(np.float64)
    ceilings = [np.ones(len(x_amax), np.float32), *(below(x_amax, w_amax, float(c)) for c in _CEILINGS)]
    return ceilings, [_migrate(x_amax, w_amax, float(a)) for a in _ALPHAS]


def _lowest(scales: list[F32], errors: LayerErrors, start: int, enough: float = math.inf) -> tuple[F32, float]:
    """Return the scale with the smallest error, and its error, where errors fall to it and rise behind it.

    Where the error of the first one reaches ``enough``, no other is looked at.
    """
    best, error = start, errors.total(scales[start], WEIGHT_ERROR, enough)
    for step in (1, -1):
        while error < enough and 0 <= best + step < len(scales):
            following = errors.total(scales[best + step], WEIGHT_ERROR, error)
            if following >= error:
                break
            best, error = best + step, following
    return scales[best], error


def _migrate(x_amax: Array, w_amax: Array, alpha: float) -> F32:
    live = (x_amax > 0) & (w_amax > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return bounded(x_amax**alpha / w_amax ** (1 - alpha), live)


def below(x_amax: Array, w_amax: Array, ceiling: float) -> F32:
    """Return scales that bring all channels below a share of the largest magnitude, 1 where they are already.

    Args:
        x_amax: Largest magnitude of each channel [in].
        w_amax: Largest magnitude of each column of the weight [in]; where it is 0 nothing is to be gained.
        ceiling: The share, 0 to 1.
    """
    live = (x_amax > 0) & (w_amax > 0)
    return bounded(np.maximum(1, x_amax / max(ceiling * x_amax.max(initial=0), 1e-30)), live)


EQUALIZERS.add("smoothquant", SmoothQuant())
