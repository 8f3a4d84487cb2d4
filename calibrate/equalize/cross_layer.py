"""Cross-layer equalization: move magnitude from channel to channel along a chain of layers, without any data.

Letters: ``out``, ``in`` channels of a layer, ``mid`` channels of a tensor between two layers, ``k`` kernel dimensions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import F32, F64, bounded

Array = npt.NDArray[Any]


def cross_layer(chain: Sequence[Array], rounds: int = 50, tolerance: float = 1e-4) -> list[F32]:
    """Return a scale per channel of each tensor between two layers of a chain.

    What: ``s = sqrt(r1 / r2)`` with ``r1`` the largest weight that makes a channel and ``r2`` the largest that reads
    it; afterwards both are ``sqrt(r1 r2)``. Pairs are taken in turn until nothing moves.

    When to use: weights with one scale per tensor, where a layer's channels differ by orders of magnitude: after
    folding BatchNorm, and above all depthwise Conv. Weights with a scale per channel gain little. Between the layers
    only what commutes with a positive factor per channel may stand (Relu, LeakyRelu, PRelu, pooling; not Clip, Sigmoid
    or Gelu), and nothing else may read the tensor.

    Args:
        chain: `magnitudes` [out, in] of the layers, first to last, ``out`` of each being ``in`` of the next.
        rounds: Largest number of passes over the chain.
        tolerance: Largest change of a scale, relative, that counts as none.

    Returns:
        For each layer but the last ``channel_scale`` [mid]: divide the layer's output channels and bias by it, multiply
        the input channels of the next layer. Channels that are dead on either side get 1.

    Raises:
        ValueError: The shapes do not form a chain.

    Source: Nagel et al., "Data-free quantization through weight equalization and bias correction", section 4.1 (2019).
    """
    if any(len(first) != following.shape[1] for first, following in itertools.pairwise(chain)):
        raise ValueError(f"not a chain: {', '.join(str(list(m.shape)) for m in chain)}")
    layers = [m.astype(np.float64) for m in chain]
    scales = [np.ones(len(m)) for m in layers[:-1]]
    for _ in range(rounds):
        moved = 0.0
        for i, scale in enumerate(scales):
            step = _balance(layers[i].max(axis=1, initial=0), layers[i + 1].max(axis=0, initial=0))
            layers[i] /= step[:, None]
            layers[i + 1] *= step
            scale *= step
            moved = max(moved, float(np.abs(step - 1).max(initial=0)))
        if moved <= tolerance:
            break
    return [bounded(scale, np.ones(len(scale), bool)) for scale in scales]


def magnitudes(w: Array, groups: int = 1) -> F64:
    """Return the largest magnitude with which each output channel reads each input channel.

    Args:
        w: Weight of a Conv [out, in/groups, k...] or of a Gemm [out, in].
        groups: Of the Conv.

    Returns:
        [out, in], zero where the channels are in different groups.
    """
    largest = np.abs(w).astype(np.float64).reshape(*w.shape[:2], -1).max(axis=2, initial=0)
    rows, columns = len(largest) // groups, largest.shape[1]
    whole = np.zeros((len(largest), columns * groups))
    for g in range(groups):
        part = slice(g * rows, (g + 1) * rows)
        whole[part, g * columns : (g + 1) * columns] = largest[part]
    return whole


def _balance(made: F64, read: F64) -> F64:
    live = (made > 0) & (read > 0)
    return np.sqrt(np.where(live, made, 1) / np.where(live, read, 1))
