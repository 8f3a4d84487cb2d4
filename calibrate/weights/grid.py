"""The values that each weight can take, for algorithms that round column by column.

Letters: ``out``, ``in`` dimensions of the weight, ``n`` columns of it, ``r`` rows of it (output channels).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..qarray import F32, QParams, Spec, fake_quant
from .groups import row_spec

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Scale and zero point of every weight, whatever the granularity; turned, so that a column lies in one piece.

    Attributes:
        scale: [n, r].
        zero_point: [n, r], zeros where there is none.
        spec: Format and symmetry, with one scale per element of a column.
    """

    scale: F32
    zero_point: F32
    spec: Spec

    @classmethod
    def of(cls, params: QParams, shape: tuple[int, ...], rows: slice, order: Array) -> Grid:
        """Return the grid of some rows of an array of ``shape`` (out, in), its columns in ``order`` [n]."""

        def turn(values: Array | None) -> F32:
            each = np.zeros((), np.float32) if values is None else params.spec.granularity.spread(values, shape)
            return np.ascontiguousarray(np.broadcast_to(each, shape)[rows].T[order], dtype=np.float32)

        return cls(scale=turn(params.scale), zero_point=turn(params.zero_point), spec=row_spec(params.spec))

    def round(self, k: int, column: Array, neighbour: Array | None = None) -> F32:
        """Return column ``k`` of the weight, whose values are ``column`` [r], as the quantized model will have it.

        Args:
            k: Which column of the grid.
            column: Real values [r].
            neighbour: Rounded values [r] of the column with which it shares the ``pair_limit`` of the spec, if any.
        """
        if neighbour is not None:
            room = np.float32(self.spec.pair_limit) * self.scale[k]
            lowest = np.where(neighbour < 0, -room - neighbour, -np.inf)
            highest = np.where(neighbour > 0, room - neighbour, np.inf)
            column = np.clip(column, lowest, highest)
        return fake_quant(column, QParams(scale=self.scale[k], zero_point=self.zero_point[k], spec=self.spec))
