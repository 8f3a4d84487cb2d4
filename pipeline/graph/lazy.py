"""Arrays that are made on demand, region by region, so that none of them is ever held as a whole.

A region is a tuple of slices, one per axis. A reader makes the values of a region; it is opened for one pass over the
array and dropped afterwards, with whatever it holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from .parallel import in_order

Array = npt.NDArray[Any]
Region = tuple[slice, ...]
Reader = Callable[[Region], Array]

REGION = 2**19
"""Elements made at a time: large enough for numpy's loops, small enough for a cache."""


def regions(shape: tuple[int, ...], limit: int = REGION, multiple: int = 8) -> Iterator[Region]:
    """Cut an array into regions that follow each other in row-major order.

    Args:
        shape: Of the array.
        limit: Elements per region, more where rows are long.
        multiple: Regions begin at multiples of it along the axis that is cut; of 8, so that they fill whole bytes.
    """
    if 0 in shape:
        return
    axis = 0
    while axis < len(shape) - 1 and (inner := math.prod(shape[axis + 1 :])) > limit and inner % 8 == 0:
        axis += 1
    if not shape:
        yield ()
        return
    step = max(1, limit // math.prod(shape[axis + 1 :]) // multiple) * multiple
    rest = tuple(slice(0, size) for size in shape[axis + 1 :])
    for index in itertools.product(*map(range, shape[:axis])):
        before = tuple(slice(i, i + 1) for i in index)
        for start in range(0, shape[axis], step):
            yield (*before, slice(start, min(start + step, shape[axis])), *rest)


def piece(shape: tuple[int, ...], region: Region) -> tuple[int, int] | None:
    """Return first element and number of elements of a region that lies in one piece in memory, None for another."""
    first, count, inner = 0, 1, 1
    for size, part in zip(reversed(shape), reversed(region), strict=True):
        if part.stop - part.start > 1 and count != inner:
            return None
        first += part.start * inner
        count *= part.stop - part.start
        inner *= size
    return first, count


class Lazy:
    """An array that is made each time it is read.

    ``np.asarray`` makes all of it, and so does every attribute of an array that is not defined here: code that knows
    nothing of this class works too, one whole array at a time.

    Args:
        shape: Dimensions.
        dtype: numpy or ml_dtypes type.
        opener: Gives a reader for one pass. The reader may give another type, which is cast, and is called by several
            threads.
        multiple: Regions that are asked for begin at multiples of it wherever they hold more than one index.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike, opener: Callable[[], Reader], multiple: int = 1
    ) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.ndim = len(shape)
        self.size = math.prod(shape)
        self.open = opener
        self.multiple = multiple

    def jobs(self) -> Iterator[Callable[[], Array]]:
        """Yield functions that make the array's regions, which follow each other in row-major order."""
        reader = self.open()
        for region in regions(self.shape, multiple=math.lcm(self.multiple, 8)):
            yield partial(reader, region)

    def transpose(self, *axes: Any) -> Lazy:
        """Return the array with its axes in another order; nothing is read."""
        order = tuple(axes[0]) if axes and not isinstance(axes[0], int) else axes or range(self.ndim)[::-1]

        def open_turned() -> Reader:
            reader = self.open()
            return lambda region: reader(tuple(region[order.index(axis)] for axis in range(self.ndim))).transpose(order)

        return Lazy(tuple(self.shape[axis] for axis in order), self.dtype, open_turned, self.multiple)

    @property
    def T(self) -> Lazy:  # noqa: N802 - numpy's name
        """The array with its axes reversed."""
        return self.transpose()

    def reshape(self, *shape: Any) -> Lazy | Array:
        """Return the array in another shape; it is made unless the shape is its own."""
        wanted = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        known = math.prod(size for size in wanted if size >= 0)
        if tuple(self.size // max(known, 1) if size < 0 else size for size in wanted) == self.shape:
            return self
        return np.asarray(self).reshape(wanted)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        return np.asarray(self)[key]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        made = np.empty(self.size, self.dtype)
        place = 0
        for block in in_order(self.jobs()):
            made[place : place + block.size] = block.reshape(-1)
            place += block.size
        return made.reshape(self.shape).astype(dtype or self.dtype, copy=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(np.ndarray, name):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)


def by_rows(
    function: Callable[[Array], Array], source: Array | Lazy, shape: tuple[int, ...], dtype: npt.DTypeLike
) -> Array | Lazy:
    """Apply a function that treats every row for itself; a lazy array gives a lazy one.

    Args:
        function: Maps rows ``[n, ...]`` of the source to ``[n, ...]`` of the result.
        source: Array with as many rows as the result.
        shape: Of the result.
        dtype: Of the result.
    """
    if not isinstance(source, Lazy):
        return function(source)

    def open_mapped() -> Reader:
        reader = source.open()
        rest = tuple(slice(0, size) for size in source.shape[1:])
        return lambda region: function(reader((region[0], *rest)))[(slice(None), *region[1:])]

    return Lazy(shape, dtype, open_mapped, source.multiple)
