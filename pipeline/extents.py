"""Weights read region by region: their values, and the smallest and largest of them, without holding a whole weight.

Letters: ``d0 .. dn`` are the dimensions of a weight as its operator sees it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..calibrate.granularity import Granularity
from .constants import Weight
from .graph.constants import FileValues, stored
from .graph.halves import widened
from .graph.lazy import Reader, Region, regions

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]


def reader_of(weight: Weight) -> Reader:
    """Return a function that reads regions of a weight, in its own type; see `Values.open`.

    Through layout operators that turn the axes of a matrix, or change the shape of what a file holds, the region is
    found in what is stored; through others, the weight is made as a whole.
    """
    held = stored(weight.constant)
    if isinstance(held, FileValues) and all(kind == "R" for kind, _ in weight.steps):
        return held.open(weight.shape)
    order = _order(weight)
    if order is None:
        array = weight.values()
        return lambda region: array[region]
    reader = held.open()
    places = [order.index(axis) for axis in range(len(order))]
    return lambda region: reader(tuple(region[place] for place in places)).transpose(order)


def _order(weight: Weight) -> tuple[int, ...] | None:
    """Return which stored axis each axis of a weight is, None where its shape is another one."""
    order = tuple(range(len(weight.constant.shape)))
    for kind, how in weight.steps:
        if kind != "T":
            return None
        order = tuple(order[axis] for axis in how)
    return order


def extremes(x: Array, granularity: Granularity) -> tuple[F32, F32]:
    """Return smallest and largest value of ``x [d0..dn]`` per scale, [scale_shape]; NaN where there is one.

    Floats of 16 bits are compared as integers of the same order, without being widened.
    """
    if x.dtype.itemsize == 2 and x.dtype.kind in "fV":
        keys = _ordered(np.ascontiguousarray(x).view(np.int16))
        lo, hi = granularity.reduce(keys, np.minimum), granularity.reduce(keys, np.maximum)
        return _unordered(lo, x.dtype), _unordered(hi, x.dtype)
    wide = widened(x)
    return granularity.reduce(wide, np.minimum), granularity.reduce(wide, np.maximum)


def _ordered(bits: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """Turn the bits of floats into integers of the same order, and back: negative ones count backwards."""
    sign = bits >> 15
    sign &= np.int16(0x7FFF)
    return np.asarray(sign ^ bits)


def _unordered(keys: npt.NDArray[np.int16], dtype: np.dtype[Any]) -> F32:
    return _ordered(keys).view(dtype).astype(np.float32)


def scale_region(region: Region, granularity: Granularity, rank: int) -> Region:
    """Return where the scales of a region lie in an array of [scale_shape]."""
    if granularity.axis is None:
        return ()
    axis, size = granularity.axis % rank, granularity.block_size
    if not size:
        return tuple(part if i == axis else slice(0, 1) for i, part in enumerate(region))
    blocks = slice(region[axis].start // size, -(-region[axis].stop // size))
    return (*region[:axis], blocks, *region[axis + 1 :])


@dataclass(slots=True)
class Extent:
    """Smallest and largest values of a weight, put together from those of its regions.

    Attributes:
        granularity: Which elements share a scale.
        lo: Smallest values, [scale_shape]; NaN where there is one.
        hi: Largest values.
    """

    granularity: Granularity
    lo: F32
    hi: F32

    @classmethod
    def empty(cls, shape: tuple[int, ...], granularity: Granularity) -> Extent:
        """Return the extent of no values of an array of ``shape``."""
        wanted = granularity.scale_shape(shape)
        start = np.inf if 0 not in shape else 0.0
        return cls(granularity, np.full(wanted, start, np.float32), np.full(wanted, -start, np.float32))

    @property
    def is_finite(self) -> bool:
        """Whether all values are."""
        return bool(np.isfinite(self.lo).all() and np.isfinite(self.hi).all())

    @property
    def amax(self) -> float:
        """Largest magnitude."""
        return float(max(np.abs(self.lo).max(initial=0.0), np.abs(self.hi).max(initial=0.0)))

    def add(self, place: Region, lo: F32, hi: F32) -> None:
        """Take the extremes of a region into account, whose scales lie at ``place``."""
        self.lo[place] = np.minimum(self.lo[place], lo)
        self.hi[place] = np.maximum(self.hi[place], hi)


def extent_jobs(weight: Weight, granularity: Granularity) -> Iterator[Callable[[], tuple[Region, F32, F32]]]:
    """Yield functions that find the extremes of one region of a weight each: place among the scales, lo, hi.

    Regions follow the order of the file, whatever way round the operator sees the weight.
    """
    order = _order(weight) or tuple(range(len(weight.shape)))
    stored_shape = tuple(weight.shape[order.index(axis)] for axis in range(len(order)))
    reader = reader_of(weight)

    def of(part: Region) -> tuple[Region, F32, F32]:
        region = tuple(part[axis] for axis in order)
        lo, hi = extremes(reader(region), granularity)
        return scale_region(region, granularity, len(order)), lo, hi

    for part in regions(stored_shape, multiple=math.lcm(8, granularity.block_size or 1)):
        yield partial(of, part)
