"""SmoothQuant: move the outliers of activations into the weights.

Letters: ``out``, ``in`` dimensions of the weight, ``j`` an input channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..qarray import Spec
from ..weights import WeightStats
from ..weights.rtn import Rtn
from . import EQUALIZERS, best_scale, bounded, channels_of, output_error

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]

_ALPHAS = np.linspace(0, 1, 21)


@dataclass(frozen=True, slots=True)
class SmoothQuant:
    """What: ``s_j = amax(x_j)^alpha / amax(w_j)^(1 - alpha)``.

    With alpha 1 all channels of x get one magnitude, with 0 all columns of w do; between, both get part of the burden.

    Without an alpha, 0 to 1 in steps of 0.05 and no scale at all are tried per layer, and the smallest expected error
    of the output wins, with both x and w rounded as the specs say.

    When to use: 8-bit activations with one scale per tensor in transformers, where a few channels are many times
        larger than the others.
    Options: alpha, the migration strength; the paper takes 0.5, and 0.75 and more for strong outliers.
    Source: Xiao et al., "SmoothQuant: accurate and efficient post-training quantization for large language models",
        equation 4 (2022).
    """

    alpha: float | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "channels"})

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError("alpha is between 0 and 1")

    def __call__(self, w: Array, spec: Spec, stats: WeightStats | None, x_spec: Spec | None) -> F32:
        """Return ``channel_scale`` [in] for ``w`` [out, in]."""
        x_amax = channels_of("smoothquant", w, stats).amax.astype(np.float64)
        w_amax = np.abs(w).max(axis=0, initial=0).astype(np.float64)
        if self.alpha is not None:
            return _migrate(x_amax, w_amax, self.alpha)
        assert stats is not None
        candidates = [np.ones(len(x_amax), np.float32), *(_migrate(x_amax, w_amax, float(a)) for a in _ALPHAS)]
        return best_scale(candidates, lambda s: output_error(w * s, spec, stats.scaled(s), x_spec, Rtn()))


def _migrate(x_amax: Array, w_amax: Array, alpha: float) -> F32:
    live = (x_amax > 0) & (w_amax > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return bounded(x_amax**alpha / w_amax ** (1 - alpha), live)


EQUALIZERS.add("smoothquant", SmoothQuant())
