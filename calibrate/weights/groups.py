"""One row per scale: the layout in which scales are searched, whatever the granularity.

Letters: ``out``, ``in`` dimensions of a weight, ``g`` its number of scales, ``e`` how many weights share one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..granularity import Granularity, per_channel
from ..qarray import Spec

Array = npt.NDArray[Any]

_CHUNK = 1 << 17
"""Weights handled at once in a search: the temporaries then stay in a second-level cache."""


def row_spec(spec: Spec) -> Spec:
    """Return ``spec`` with one scale per row, for use inside a search.

    Integer codes are held in float32, which is exact and saves packing. A scale against a scale of the whole tensor
    (two levels) is left unrounded, for there is no whole tensor here; one that stands alone is rounded as stored.
    """
    fmt = replace(spec.format, block_size=0)
    if fmt.is_integer:
        fmt = replace(fmt, dtype=np.float32)
    if fmt.scale_levels == 2:
        fmt = replace(fmt, scale_format="float32", scale_levels=1)
    return replace(spec, format=fmt, granularity=per_channel(0))


def to_groups(x: Array, granularity: Granularity) -> Array:
    """Lay ``x`` [out, in] out as [g, e]. A last block that is cut short is filled with zeros, which stay zero."""
    if granularity.axis is None:
        return x.reshape(1, -1)
    rows = x if along_rows(granularity) else x.T
    size = granularity.block_size
    if not size:
        return rows
    missing = -rows.shape[1] % size
    return (np.pad(rows, ((0, 0), (0, missing))) if missing else rows).reshape(-1, size)


def from_groups(values: Array, granularity: Granularity, shape: tuple[int, int]) -> Array:
    """Bring ``values`` [g, 1] into the scale shape of an array of ``shape`` (out, in)."""
    wanted = granularity.scale_shape(shape)
    if granularity.axis is None or along_rows(granularity):
        return values.reshape(wanted)
    return np.ascontiguousarray(values.reshape(wanted[::-1]).T)


def chunks(groups: Array) -> Iterator[slice]:
    """Yield slices of the rows of ``groups`` [g, e] that are small enough to stay in cache."""
    step = max(1, _CHUNK // max(1, groups.shape[1]))
    for start in range(0, max(1, len(groups)), step):
        yield slice(start, start + step)


def along_rows(granularity: Granularity) -> bool:
    """Whether the weights that share a scale follow each other in a row: blocks cut the axis, channels keep it."""
    return (granularity.axis in (1, -1)) == bool(granularity.block_size)
