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

from typing import Any

import numpy as np
import numpy.typing as npt

from ..qarray import (
    QArray,
    QParams,
    Spec,
    dequantize,
    minmax_range,
    params_from_range,
    params_from_scale,
    quantize,
)

Array = npt.NDArray[Any]

PAIR_LIMIT = 128
"""Largest ``|w0| + |w1|`` of one sign with ``255 * sum <= 32767``."""

_GROWTH = np.linspace(1.0, 2.0, 21)
"""Scales tried, over the one that holds the largest weight; at 2 all codes are within 64, and no pair gives way."""

FEW_INPUTS = 128
"""Below so many inputs every scale is tried."""


def limit_pairs(codes: Array, limit: int) -> Array:
    """Return ``codes`` [out, in] in which neighbouring pairs of one sign sum to at most ``limit`` in magnitude.

    A pair that exceeds it gives way on both sides, by half of the excess each: the nearest pair in squared error.
    """
    first, second = codes[:, : codes.shape[1] - 1 : 2], codes[:, 1::2]
    sums = np.add(first, second, dtype=np.int32)
    channel, pair = np.nonzero(np.abs(sums) > limit)
    alike = np.sign(first[channel, pair]) == np.sign(second[channel, pair])
    channel, pair = channel[alike], pair[alike]
    excess, sign = np.abs(sums[channel, pair]) - limit, np.sign(sums[channel, pair])
    result = codes.copy(order="K")
    result[channel, 2 * pair] -= (sign * ((excess + 1) // 2)).astype(codes.dtype)
    result[channel, 2 * pair + 1] -= (sign * (excess // 2)).astype(codes.dtype)
    return result


def pair_safe(w: Array, spec: Spec, energy: Array | None = None) -> QArray:
    """Quantize ``w`` with the scales at which its error is smallest once pairs are limited.

    With many inputs the error that is to be expected decides, which the few pairs beyond the limit tell; with few
    inputs chance plays a part, and every scale is tried.

    Args:
        w: Weight [out, in], finite.
        spec: Symmetric signed integers, per tensor or per channel of axis 0, with a ``pair_limit``.
        energy: Weight of each input's error [in], e.g. its mean square; None counts all alike.

    Returns:
        Codes [out, in] that honour the limit.
    """
    base = params_from_range(minmax_range(w, spec.granularity), spec)
    importance = np.ones(w.shape[1]) if energy is None else np.asarray(energy, dtype=np.float64)
    errors = (_tried if w.shape[1] < FEW_INPUTS else _expected)(w, base, importance)
    if base.scale.ndim == 0:
        return _enlarged(w, base, _GROWTH[errors.sum(axis=1).argmin()])
    return _enlarged(w, base, _GROWTH[errors.argmin(axis=0)][:, None])


def _enlarged(w: Array, base: QParams, growth: Array | float) -> QArray:
    params = params_from_scale(base.scale * growth, base.spec)
    return QArray(q=limit_pairs(quantize(w, params).q, base.spec.pair_limit), params=params)


def _tried(w: Array, base: QParams, importance: Array) -> Array:
    """Return the squared error at every growth and output channel: [growths, out]."""
    return np.stack([np.square(dequantize(_enlarged(w, base, g)) - w) @ importance for g in _GROWTH])


def _expected(w: Array, base: QParams, importance: Array) -> Array:
    """Return the squared error to expect at every growth and output channel: [growths, out].

    Rounding costs a twelfth of the squared step per weight; a pair that gives way, half of its excess on either side.
    """
    scale = np.broadcast_to(base.scale.astype(np.float64), (len(w), 1))[:, 0]
    sums = np.abs(w[:, : w.shape[1] - 1 : 2] + w[:, 1::2])
    channel, pair = np.nonzero(sums > (base.spec.pair_limit * scale[:, None]).astype(np.float32))
    over, limit = sums[channel, pair].astype(np.float64), base.spec.pair_limit * scale[channel]
    weight = importance[2 * pair] + importance[2 * pair + 1]

    def at(growth: float) -> Array:
        lost = weight * np.square(np.maximum(over - growth * limit, 0) / 2)
        gone = np.bincount(channel, weights=lost, minlength=len(w))
        return np.asarray(gone + np.square(growth * scale) / 12 * importance.sum())

    return np.stack([at(float(growth)) for growth in _GROWTH])
