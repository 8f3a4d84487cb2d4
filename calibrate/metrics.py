"""Error measures: one definition, used by range search, validation, reports and tests.

All take a reference and an approximation of the same shape and compute in float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def mse(reference: Array, approximation: Array) -> float:
    """Mean squared error; 0 for empty arrays."""
    if reference.size == 0:
        return 0.0
    difference = reference.astype(np.float64) - approximation.astype(np.float64)
    return float(np.mean(np.square(difference)))


def sqnr_db(reference: Array, approximation: Array) -> float:
    """Signal to quantization noise ratio in decibels: 10 log10(sum r^2 / sum (r - a)^2); inf when equal."""
    signal = float(np.sum(np.square(reference.astype(np.float64))))
    noise = float(np.sum(np.square(reference.astype(np.float64) - approximation.astype(np.float64))))
    if noise == 0:
        return math.inf
    return -math.inf if signal == 0 else 10 * math.log10(signal / noise)


def cosine(reference: Array, approximation: Array) -> float:
    """Cosine of the angle between the two arrays, flattened; 1 when both are zero, 0 when one is."""
    a, b = reference.astype(np.float64).ravel(), approximation.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norms == 0:
        return 1.0 if not a.any() and not b.any() else 0.0
    return float(np.clip(a @ b / norms, -1.0, 1.0))


def max_abs(reference: Array, approximation: Array) -> float:
    """Largest absolute difference; 0 for empty arrays."""
    if reference.size == 0:
        return 0.0
    return float(np.max(np.abs(reference.astype(np.float64) - approximation.astype(np.float64))))
