"""Per-channel magnitudes of an activation, and the channels that stick out.

Letters: ``c`` channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .extrema import F32

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelAmax:
    """How large the values of each channel are.

    `amax` and `tokens` are exact under any split and order of the data. The two sums are float64 and therefore equal
    only to about 1e-15 relative between different batch sizes; the same batches added in the same order, in one run or
    in several, give the same bits.

    Attributes:
        amax: Largest magnitude, float32 [c].
        total: Sum of magnitudes, float64 [c].
        energy: Sum of squares, float64 [c].
        tokens: Number of values per channel.
    """

    amax: F32
    total: F64
    energy: F64
    tokens: int

    @classmethod
    def of(cls, x: F32) -> ChannelAmax:
        """Return the statistics of ``x [tokens, c]``, finite values only (see `as_tokens`)."""
        magnitude = np.abs(x)
        wide = magnitude.astype(np.float64)
        total = np.add.reduce(wide, axis=0)
        return cls(
            amax=np.maximum.reduce(magnitude, axis=0, initial=0.0),
            total=total,
            energy=np.add.reduce(np.square(wide, out=wide), axis=0),
            tokens=len(x),
        )

    @property
    def mean(self) -> F64:
        """Mean magnitude, [c]; 0 without tokens."""
        return np.asarray(self.total / max(self.tokens, 1))

    def merge(self, other: ChannelAmax) -> ChannelAmax:
        """Return the statistics of both streams.

        Raises:
            ValueError: The numbers of channels differ.
        """
        if self.amax.shape != other.amax.shape:
            raise ValueError(f"{len(self.amax)} channels cannot be merged with {len(other.amax)}")
        return ChannelAmax(
            amax=np.maximum(self.amax, other.amax),
            total=self.total + other.total,
            energy=self.energy + other.energy,
            tokens=self.tokens + other.tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlierChannel:
    """One channel that stands out: its index, largest magnitude and share of the tensor's energy."""

    channel: int
    amax: float
    share: float


def outlier_channels(stats: ChannelAmax, threshold: float = 6.0, limit: int = 16) -> list[OutlierChannel]:
    """Return the channels whose magnitude exceeds the typical one by far, largest first.

    Args:
        stats: The magnitudes of a tensor.
        threshold: A channel stands out when its amax exceeds this many times the median amax.
        limit: Return at most this many.

    Source: Dettmers et al., "LLM.int8()", section 3.2 (2022), where the threshold is an absolute 6.0.
    """
    typical = float(np.median(stats.amax)) if len(stats.amax) else 0.0
    order = np.argsort(-stats.amax, kind="stable")[:limit]
    whole = float(stats.energy.sum()) or 1.0
    return [
        OutlierChannel(channel=int(c), amax=float(stats.amax[c]), share=float(stats.energy[c]) / whole)
        for c in order
        if stats.amax[c] > threshold * typical
    ]
