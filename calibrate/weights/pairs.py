"""Weights for kernels that add two products in 16 bits.

x86 CPUs without VNNI multiply unsigned activations by signed weights with ``vpmaddubsw``, which adds the products of
two neighbouring inputs in 16 bits and saturates: ``255 * (w0 + w1) > 32767`` as soon as two neighbouring weights of one
sign sum to more than 128. Giving up a bit of every weight (codes in -63..63) avoids that and costs four times the
squared error. Limiting the sums themselves costs about 1.4 times: most pairs are far below the limit, so the scale
grows a little and the few pairs that still exceed it give way.

Letters: ``out`` output channels, ``in`` inputs in the order in which the kernel walks them, ``c`` candidate scales.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, PMADDUBSW; the search is our own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from ..qarray import QArray, QParams, Spec, minmax_range, params_from_range, quantize

Array = npt.NDArray[Any]

PAIR_LIMIT = 128
"""Largest ``|w0| + |w1|`` of one sign with ``255 * sum <= 32767``."""

_GROWTH = np.linspace(1.0, 2.0, 21)
"""Scales tried, over the one that holds the largest weight; at 2 all codes are within 64, and no pair gives way."""


def limit_pairs(codes: Array, limit: int) -> Array:
    """Return ``codes`` [out, in] in which neighbouring pairs of one sign sum to at most ``limit`` in magnitude.

    A pair that exceeds it gives way on both sides, by half of the excess each: the nearest pair in squared error.
    """
    result = codes.astype(np.int32)
    paired = result.shape[1] - result.shape[1] % 2
    first, second = result[:, 0:paired:2], result[:, 1:paired:2]
    excess = np.maximum(np.abs(first) + np.abs(second) - limit, 0) * (np.sign(first) == np.sign(second))
    first -= np.sign(first) * ((excess + 1) // 2)
    second -= np.sign(second) * (excess // 2)
    return result.astype(codes.dtype)


def pair_safe(w: Array, spec: Spec, energy: Array | None = None) -> QArray:
    """Quantize ``w`` with the scales at which its error is smallest once pairs are limited.

    Args:
        w: Weight [out, in], finite.
        spec: Symmetric signed integers, per tensor or per channel of axis 0, with a ``pair_limit``.
        energy: Weight of each input's error [in], e.g. its mean square; None counts all alike.

    Returns:
        Codes [out, in] that honour the limit.
    """
    base = params_from_range(minmax_range(w, spec.granularity), spec)
    importance = np.ones(w.shape[1]) if energy is None else np.asarray(energy, dtype=np.float64)
    best = _attempt(w, base, 1.0)
    least = _error(w, best, importance)
    for growth in _GROWTH[1:]:
        trial = _attempt(w, base, float(growth))
        error = _error(w, trial, importance)
        better = error < least
        least = np.where(better, error, least)
        best = _choose(better, trial, best)
    return best


def _attempt(w: Array, base: QParams, growth: float) -> QArray:
    params = dataclasses.replace(base, scale=(base.scale * np.float32(growth)).astype(np.float32))
    codes = quantize(w, params)
    return QArray(q=limit_pairs(codes.q, base.spec.pair_limit), params=params)


def _error(w: Array, qarray: QArray, importance: Array) -> Array:
    """Return the weighted squared error per scale: [out, 1], or [] for one scale."""
    difference = qarray.q * qarray.params.scale.astype(np.float64) - w
    per_channel = np.square(difference) @ importance
    return np.asarray(per_channel.sum() if qarray.params.scale.ndim == 0 else per_channel[:, None])


def _choose(better: Array, trial: QArray, best: QArray) -> QArray:
    scale = np.where(better, trial.params.scale, best.params.scale).astype(np.float32)
    return QArray(q=np.where(better, trial.q, best.q), params=dataclasses.replace(best.params, scale=scale))
