"""Layouts: bring any activation to ``x [tokens, in]``.

Letters: ``N`` batch, ``C`` channels, ``H W ..`` spatial dimensions, ``K`` kernel positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .extrema import F32, SENTINEL, as_float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """How a Conv reads its input, in ONNX's own attributes.

    Attributes:
        kernel_shape: One entry per spatial dimension.
        strides: Steps of the window.
        dilations: Distance between kernel positions.
        pads: Zeros before each spatial dimension, then after each: ``(h0, w0, h1, w1)``.
    """

    kernel_shape: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]

    def unfold(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the patches that a Conv multiplies by its weight.

        Args:
            x: ``[N, C, H, W, ..]``.

        Returns:
            ``[N * positions, C * K]``, columns in the order of a weight ``[out, C, kH, kW, ..]`` flattened to
            ``[out, C * K]``. A grouped Conv uses the columns of its own channels.

        Source: ONNX operator Conv.
        """
        rank = len(self.kernel_shape)
        pads = [(0, 0), (0, 0), *zip(self.pads[:rank], self.pads[rank:], strict=True)]
        spans = tuple(d * (k - 1) + 1 for k, d in zip(self.kernel_shape, self.dilations, strict=True))
        views = np.lib.stride_tricks.sliding_window_view(np.pad(x, pads), spans, axis=tuple(range(2, 2 + rank)))
        every = (slice(None), slice(None))
        picked = views[(*every, *(slice(None, None, s) for s in (*self.strides, *self.dilations)))]
        first = np.moveaxis(picked, 1, 1 + rank)
        return first.reshape(-1, x.shape[1] * math.prod(self.kernel_shape))


def as_tokens(x: npt.NDArray[Any], axis: int = -1, window: Window | None = None, sentinel: float = SENTINEL) -> F32:
    """Return ``x`` as float32 ``[tokens, in]``; NaN, infinities and sentinels become 0.

    Args:
        x: Any shape with at least one dimension.
        axis: The axis of the channels; all others count as tokens.
        window: For a Conv: tokens are the patches it reads, and ``in`` is ``C * K``.
        sentinel: Magnitude from which a finite value is a mask.

    Raises:
        TypeError: ``x`` holds no floating-point numbers.
    """
    values = as_float32(x).reshape(x.shape)
    rows = window.unfold(values) if window else np.moveaxis(values, axis, -1).reshape(-1, x.shape[axis])
    if rows.size and not (-sentinel < rows.min() and rows.max() < sentinel):
        rows = np.where(np.abs(rows) < sentinel, rows, np.float32(0))
    return np.ascontiguousarray(rows)
