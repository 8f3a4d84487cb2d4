"""Correction: weights that make up for what the quantized layers before them did to their input.

The layer read ``X`` in the float model and reads ``X̃`` in the quantized one. What it should give is ``X wᵀ``; the
weight that comes closest to it from ``X̃`` is the least-squares fit ``w + w D (X̃ᵀX̃)⁻¹`` with ``D = (X - X̃)ᵀ X̃``. The
error that a rounded weight adds to the rest of that fit is measured by ``X̃ᵀX̃`` alone, so every weight algorithm goes
on from the fit as if nothing had happened.

Letters: ``out``, ``in`` dimensions of the weight.
Source: normal equations; the same aim as Li et al., "GPTAQ: efficient finetuning-free quantization for asymmetric
calibration", section 3 (2025), there inside the solver.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import WeightStats
from .gptq import damped

Array = npt.NDArray[Any]

DAMPING = 0.2
"""Share of the energy of each channel that holds its weights back: a fit to few tokens must not follow their noise."""


def corrected(w: Array, stats: WeightStats | None) -> Array:
    """Return the weight [out, in] that gives the float layer's output best, as far as it can be told.

    Args:
        w: Float weight [out, in].
        stats: Of the input that the quantized layers before give; without ``drift`` the weight stays as it is.
    """
    if stats is None or stats.gram is None or stats.drift is None:
        return w
    drift = stats.drift / max(stats.gram.tokens, 1)
    fit = np.linalg.solve(damped(stats.gram, DAMPING), (w.astype(np.float64) @ drift).T).T
    return np.asarray(w + fit, dtype=np.float32)
