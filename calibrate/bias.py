"""Bias correction: what quantizing a layer adds to its output on average is taken back in its bias.

Letters: ``out``, ``in`` channels of the layer, ``k`` kernel dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]


def correction(w: Array, w_q: Array, mean_x: Array, mean_x_q: Array | None = None, groups: int = 1) -> F64:
    """Return what to add to the bias so that the mean of every output channel is that of the float layer.

    What: ``w E[x] - w_q E[x_q]``, exact for the data that the means were taken of.

    When to use: always when the means are at hand: it costs nothing at run time. It gains most below 8 bits, and for
    depthwise Conv, where few weights make up a channel.

    A Conv is treated as if every kernel position saw the same mean, which leaves out the zeros of its padding; with the
    mean of the unfolded input ``[in * k]`` and weights reshaped to ``[out, in * k]`` the padding is exact as well.

    Args:
        w: Weight [out, in], or of a Conv [out, in/groups, k...].
        w_q: What stands in its place, dequantized, of the same shape.
        mean_x: Mean of each input channel in the float model, [in].
        mean_x_q: The same behind the quantized layers before this one; None when it is taken not to differ.
        groups: Of the Conv.

    Returns:
        Correction [out].

    Raises:
        ValueError: The shapes do not fit.

    Source: Nagel et al., "Data-free quantization through weight equalization and bias correction", section 4.2 (2019),
    with means measured on data (their appendix D) in place of those that BatchNorm implies.
    """
    if w.shape != w_q.shape:
        raise ValueError(f"weights of {list(w.shape)} and {list(w_q.shape)} cannot be compared")
    seen = mean_x if mean_x_q is None else mean_x_q
    return _mean_output(w, mean_x, groups) - _mean_output(w_q, seen, groups)


def _mean_output(w: Array, mean_x: Array, groups: int) -> F64:
    taps = w.astype(np.float64).reshape(*w.shape[:2], -1).sum(axis=2)
    if len(mean_x) != taps.shape[1] * groups or len(taps) % groups:
        raise ValueError(f"a mean of {len(mean_x)} channels does not fit a weight of {list(w.shape)}, groups {groups}")
    by_group = taps.reshape(groups, -1, taps.shape[1])
    return np.asarray(by_group @ mean_x.astype(np.float64).reshape(groups, -1, 1)).reshape(-1)
