"""Granularity: which elements of an array share one scale.

Letters: ``d0 .. dn`` are the dimensions of the array, ``a`` the axis, ``B`` the block size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class Granularity:
    """ONNX's own two words.

    =================  ============================  =========================================
    ``axis, block``    scale shape of ``[d0,d1,d2]``  name
    =================  ============================  =========================================
    ``None, 0``        ``[]``                        per tensor
    ``1, 0``           ``[1, d1, 1]``                per channel of axis 1
    ``1, B``           ``[d0, ceil(d1/B), d2]``      blocks of B along axis 1
    =================  ============================  =========================================

    Attributes:
        axis: The axis that is kept (per channel) or cut into blocks; None for one scale per tensor.
        block_size: 0 for no blocks.
    """

    axis: int | None = None
    block_size: int = 0

    def __post_init__(self) -> None:
        if self.axis is None and self.block_size:
            raise ValueError("block_size needs an axis")
        if self.block_size < 0:
            raise ValueError(f"block_size is {self.block_size}, expected 0 or more")

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the scales of an array of ``shape``: rank 0, or the rank of the array."""
        if self.axis is None:
            return ()
        axis = self.axis % len(shape)
        if self.block_size:
            blocks = -(-shape[axis] // self.block_size)
            return (*shape[:axis], blocks, *shape[axis + 1 :])
        return tuple(d if i == axis else 1 for i, d in enumerate(shape))

    def spread(self, values: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return ``values [scale_shape]`` in a shape that broadcasts against an array of ``shape``.

        Blocks are repeated along the axis; the last one may be cut short.
        """
        if self.axis is None or not self.block_size:
            return values
        axis = self.axis % len(shape)
        repeated = np.repeat(values, self.block_size, axis=axis)
        return repeated.take(range(shape[axis]), axis=axis) if repeated.shape != shape else repeated

    def reduce(self, x: npt.NDArray[Any], ufunc: np.ufunc) -> npt.NDArray[Any]:
        """Reduce ``x [d0..dn]`` with ``ufunc`` (``np.minimum``, ``np.maximum``, ``np.add``) to ``[scale_shape]``."""
        if self.axis is None:
            return np.asarray(ufunc.reduce(x, axis=None))
        axis, size = self.axis % x.ndim, self.block_size
        if not size:
            others = tuple(i for i in range(x.ndim) if i != axis)
            return np.asarray(
                ufunc.reduce(_folded(x, ufunc) if x.ndim - 1 in others else x, axis=others, keepdims=True)
            )
        if ufunc not in _ORDERLESS:
            return np.asarray(ufunc.reduceat(x, np.arange(0, x.shape[axis], size), axis=axis))
        whole = x.shape[axis] // size
        head, rest = np.split(x, [whole * size], axis=axis)
        blocks = head.reshape(*x.shape[:axis], whole, size, *x.shape[axis + 1 :])
        found = ufunc.reduce(_folded(blocks, ufunc) if axis == x.ndim - 1 else blocks, axis=axis + 1)
        if not rest.shape[axis]:
            return np.asarray(found)
        return np.concatenate([found, ufunc.reduce(rest, axis=axis, keepdims=True)], axis=axis)


_ORDERLESS = (np.minimum, np.maximum)
_SHORT = 256


def _folded(x: npt.NDArray[Any], ufunc: np.ufunc) -> npt.NDArray[Any]:
    """Return ``x`` with short rows folded in halves: numpy reduces them slowly, and halves of them quickly."""
    while ufunc in _ORDERLESS and x.shape[-1] <= _SHORT and x.shape[-1] % 2 == 0 and x.size:
        half = x.shape[-1] // 2
        x = ufunc(x[..., :half], x[..., half:])
    return x


PER_TENSOR = Granularity()


def per_channel(axis: int) -> Granularity:
    """One scale per index of ``axis``: ``[d0,d1]`` with axis 0 has scales ``[d0,1]``."""
    return Granularity(axis=axis)


def per_block(axis: int, block_size: int) -> Granularity:
    """One scale per ``block_size`` elements along ``axis``: ``[d0,d1]``, axis 1 -> ``[d0,ceil(d1/B)]``."""
    return Granularity(axis=axis, block_size=block_size)
