"""Gram matrix of a layer's input: what GPTQ, AWQ and other weight algorithms know about the data.

Letters: ``t`` tokens, ``i`` input channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .channel_amax import F64
from .extrema import F32

_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Gram:
    """``XᵀX`` over tokens, not divided by their number.

    float64 sums depend on the order of addition in their last bits: equal to about 1e-15 relative between different
    batch sizes, bit-identical when the same batches are added in the same order.

    Attributes:
        matrix: float64 [i, i], symmetric.
        tokens: Number of rows of X.
    """

    matrix: F64
    tokens: int

    @classmethod
    def of(cls, x: F32) -> Gram:
        """Return the Gram matrix of ``x [t, i]``, finite values only (see `as_tokens`)."""
        matrix = np.zeros((x.shape[1], x.shape[1]))
        for first in range(0, len(x), _ROWS):
            rows = x[first : first + _ROWS].astype(np.float64)
            matrix += rows.T @ rows
        return cls(matrix=matrix, tokens=len(x))

    def merge(self, other: Gram) -> Gram:
        """Return the Gram matrix of both streams.

        Raises:
            ValueError: The numbers of channels differ.
        """
        if self.matrix.shape != other.matrix.shape:
            raise ValueError(f"{len(self.matrix)} channels cannot be merged with {len(other.matrix)}")
        return Gram(matrix=self.matrix + other.matrix, tokens=self.tokens + other.tokens)
