"""Tell tensors that were rescaled on purpose from tensors that got noisy.

Equalization (SmoothQuant, AWQ, cross-layer) multiplies the channels of an activation by factors and divides the weights
behind by them: the model computes the same, and its inner tensors differ by far. The noise that counts is what is left
when every channel has been scaled back.

Letters: ``c`` channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

PER_CHANNEL = 8
"""Values per channel below which a factor per channel would explain anything."""

FAR_LESS = 0.1
"""Share of the plain noise that must be left for a tensor to count as rescaled; noise itself has no such factor."""

LEFT = 0.25
"""Noise to signal that may be left: the best factor for a tensor that is nothing but noise is 0, which leaves 1."""


class Rescaling:
    """Gathers, batch by batch, what is left of the noise of one tensor when each channel is scaled back.

    The channels are the second axis of a tensor of four or more axes, else the last one.
    """

    def __init__(self) -> None:
        self._sums: npt.NDArray[np.float64] | None = None  # r r, a a, r a per channel
        self._plain = 0.0
        self._values = 0

    def update(self, reference: Array, approximation: Array) -> None:
        """Add one batch; arrays that cannot be compared are left out."""
        if reference.shape != approximation.shape or reference.ndim < 2 or reference.size == 0:
            return
        axis = 1 if reference.ndim >= 4 else -1
        r, a = (
            np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]).astype(np.float64) for x in (reference, approximation)
        )
        known = np.isfinite(r) & np.isfinite(a)
        if not known.all():
            r, a = np.where(known, r, 0.0), np.where(known, a, 0.0)
        sums = np.stack([np.einsum("nc,nc->c", x, y) for x, y in ((r, r), (a, a), (r, a))])
        if self._sums is not None and self._sums.shape != sums.shape:
            return
        self._sums = sums if self._sums is None else self._sums + sums
        self._plain += float(np.square(r - a).sum())
        self._values += r.size

    def noise(self) -> float | None:
        """Return the energy of the noise that is left relative to the signal's, None when nothing was rescaled."""
        if self._sums is None or self._values < PER_CHANNEL * self._sums.shape[1]:
            return None
        rr, aa, ra = self._sums
        left = rr - np.divide(ra * ra, aa, out=np.zeros_like(rr), where=aa > 0)
        signal, residual = float(rr.sum()), max(0.0, float(left.sum()))
        unexplained = residual > FAR_LESS * self._plain or residual > LEFT * signal
        return None if unexplained or _is_rounding(self._plain, signal) else residual / signal


def _by_channel(x: Array, axis: int) -> npt.NDArray[np.float64]:
    return np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]).astype(np.float64)


def _is_rounding(noise: float, signal: float) -> bool:
    # Below, the difference of two large sums says nothing any more.
    return noise <= 1e-9 * signal
