"""AWQ: make the weights that meet large inputs larger before rounding, hence their relative error smaller.

Letters: ``out``, ``in`` dimensions of the weight, ``j`` an input channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..qarray import Spec
from ..weights import WeightStats, gram_of
from ..weights.rtn import RtnMse
from . import EQUALIZERS, best_scale, bounded, channels_of, output_error

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]

_ALPHAS = np.linspace(0, 1, 11)
_ROUNDING = RtnMse(candidates=8)
"""What the weights are rounded with in the search. Without clipping the choice of alpha suffers at 2 bits."""


@dataclass(frozen=True, slots=True)
class Awq:
    """What: ``s_j = mean(|x_j|)^alpha``, with the alpha whose rounded weights give the smallest output error.

    When to use: weights of 4 bits and fewer with float activations. Follow it with the weight method ``awq_clip``, or
        with ``gptq`` where some channels stick out; among equal channels GPTQ gains nothing by it.
    Options: alpha, to skip the search over 0 to 1 in steps of 0.1.
    Source: Lin et al., "AWQ: activation-aware weight quantization for LLM compression and acceleration", section 3.2
        (2023).
    """

    alpha: float | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "channels"})

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError("alpha is between 0 and 1")

    def __call__(self, w: Array, spec: Spec, stats: WeightStats | None, x_spec: Spec | None) -> F32:
        """Return ``channel_scale`` [in] for ``w`` [out, in]."""
        magnitude = channels_of("awq", w, stats).mean
        if self.alpha is not None:
            return _protect(magnitude, self.alpha)
        gram_of("awq", w, stats)
        assert stats is not None
        candidates = [_protect(magnitude, float(a)) for a in _ALPHAS]
        return best_scale(candidates, lambda s: output_error(w * s, spec, stats.scaled(s), x_spec, _ROUNDING))


def _protect(magnitude: Array, alpha: float) -> F32:
    """Return the scales, around a geometric middle of 1 so that they stay in the range of small float types."""
    live = magnitude > 0
    if not live.any():
        return np.ones(len(magnitude), np.float32)
    scale = np.where(live, magnitude, 1) ** alpha
    return bounded(scale / np.sqrt(scale[live].max() * scale[live].min()), live)


EQUALIZERS.add("awq", Awq())
