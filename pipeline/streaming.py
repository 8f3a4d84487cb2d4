"""Weights quantized with little of them in memory: codes made on demand, and output channels a strip at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..calibrate.qarray import QArray, QParams, Spec, quantize
from .constants import Weight
from .extents import reader_of, scale_region
from .graph import Lazy
from .graph.halves import widened
from .graph.lazy import Reader, Region
from .graph.parallel import in_order
from .graph.scratch import keep
from .layouts import Layout

Array = npt.NDArray[Any]
Quantizer = Callable[[Array, Spec, Layout], QArray]
"""Quantizes a weight, or some of its output channels, given in its operator's own layout."""

ROUNDING = frozenset({"rtn", "rtn_mse", "hqq", "fixed"})
"""Algorithms that round to the nearest code: their scales say everything."""
STRIPS = frozenset({"rtn", "rtn_mse", "hqq"})
"""Algorithms that quantize each output channel for itself, given a scale per channel or per block."""

_STRIP = 2**20
"""Elements of a strip of output channels."""


def in_strips(weight: Weight, spec: Spec, layout: Layout, quantizer: Quantizer, codes: Array | None) -> QParams:
    """Quantize a weight a few output channels at a time, on all cores.

    Args:
        weight: Finite, with at least one element.
        spec: In the axes of the weight.
        layout: Says which axis holds the output channels.
        quantizer: Must treat each output channel for itself.
        codes: Filled with the codes; None where only the parameters are wanted.
    """
    axis, rank, reader = layout.order[0], len(weight.shape), reader_of(weight)
    count = weight.shape[axis]
    step = max(1, _STRIP * count // int(np.prod(weight.shape)))

    def job(start: int) -> tuple[Region, QArray]:
        strip = slice(start, min(start + step, count))
        region = tuple(strip if i == axis else slice(0, size) for i, size in enumerate(weight.shape))
        values = widened(reader(region))
        return region, quantizer(values, spec, dataclasses.replace(layout, shape=values.shape))

    shape = spec.granularity.scale_shape(weight.shape)
    scale, zero = np.empty(shape, np.float32), np.empty(shape, spec.zero_dtype)
    has_zero = False
    for region, part in in_order(partial(job, start) for start in range(0, count, step)):
        place = scale_region(region, spec.granularity, rank)
        scale[place] = part.params.scale
        if part.params.zero_point is not None:
            zero[place], has_zero = part.params.zero_point, True
        if codes is not None:
            codes[region] = part.q
    return QParams(scale=scale, zero_point=zero if has_zero else None, spec=spec)


def lazy_codes(weight: Weight, params: QParams) -> Lazy:
    """Return the nearest codes of a weight, made when they are read.

    Args:
        weight: Finite.
        params: In the axes of the weight.
    """
    spec, rank = params.spec, len(weight.shape)

    def opener() -> Reader:
        reader = reader_of(weight)

        def read(region: Region) -> Array:
            place = scale_region(region, spec.granularity, rank)
            zero = None if params.zero_point is None else params.zero_point[place]
            here = QParams(scale=params.scale[place], zero_point=zero, spec=spec)
            return quantize(widened(reader(region)), here).q

        return read

    return Lazy(weight.shape, spec.format.dtype, opener, max(1, spec.granularity.block_size))


def kept(params: QParams) -> QParams:
    """Return the same parameters; those of many blocks lie in the scratch file from then on."""
    zero = None if params.zero_point is None else keep(params.zero_point)
    return dataclasses.replace(params, scale=keep(params.scale), zero_point=zero)
