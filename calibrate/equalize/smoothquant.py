"""SmoothQuant: move the outliers of activations into the weights.

Letters: ``out``, ``in`` dimensions of the weight, ``j`` an input channel.
"""

from __future__ import annotations

import functools
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

WEIGHT_ERROR = 2.0
"""How much an error of weights counts beside one of activations in the search.

Rounding errors of activations differ from token to token and average out wherever tokens are averaged, in attention and
pooling; those of weights are the same for all tokens. On MiniLM factors from 1 to 4 do alike, 16 is far worse.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search found.

    Attributes:
        scale: ``channel_scale`` [in].
        before: Expected squared error of the layer's output without it, per token and output channel.
        after: The same with it.
    """

    scale: F32
    before: float
    after: float


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
        if self.alpha is None:
            return self.search(w, spec, stats, x_spec).scale
        x_amax = channels_of("smoothquant", w, stats).amax.astype(np.float64)
        return _migrate(x_amax, np.abs(w).max(axis=0, initial=0).astype(np.float64), self.alpha)

    def search(self, w: Array, spec: Spec, stats: WeightStats | None, x_spec: Spec | None) -> Found:
        """Return the scale for ``w`` [out, in] and what it gains."""
        x_amax = channels_of("smoothquant", w, stats).amax.astype(np.float64)
        assert stats is not None
        # Errors of weights count as independent: with the Gram matrix the choice is the same, and takes far longer.
        errors = LayerErrors(w, spec, stats, x_spec)
        w_amax = errors.amax.astype(np.float64)
        unscaled = np.ones(len(x_amax), np.float32)
        ceilings = [unscaled, *(below(x_amax, w_amax, float(c)) for c in _CEILINGS)]
        powers = [_migrate(x_amax, w_amax, float(a)) for a in _ALPHAS]
        found = [_lowest(ceilings, errors, _FIRST_CEILING), _lowest(powers, errors, _FIRST_ALPHA)]
        before = errors.parts(unscaled)
        scale, after = min([(unscaled, before), *found], key=lambda entry: _weighed(entry[1]))
        return Found(scale=scale, before=sum(before), after=sum(after))


def _lowest(scales: list[F32], errors: LayerErrors, start: int) -> tuple[F32, tuple[float, float]]:
    """Return the scale with the smallest error, and its error, where errors fall to it and rise behind it."""
    parts = functools.cache(lambda index: errors.parts(scales[index]))
    best = start
    for step in (1, -1):
        while 0 <= best + step < len(scales) and _weighed(parts(best + step)) < _weighed(parts(best)):
            best += step
    return scales[best], parts(best)


def _weighed(parts: tuple[float, float]) -> float:
    return WEIGHT_ERROR * parts[0] + parts[1]


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
