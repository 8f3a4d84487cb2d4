"""HQQ: half-quadratic quantization, which needs no data.

Letters: ``g`` number of scales, ``e`` weights that share one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..qarray import SMALLEST_SCALE, QArray, QParams, Spec, dequantize, params_from_range, params_from_scale, quantize
from . import WEIGHT_METHODS, WeightStats
from .groups import chunks, from_groups, row_spec, to_groups
from .pairs import pair_safe
from .search import mse_range

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Hqq:
    """What: fit scale and zero point to the bulk of the weights, and let the outliers be.

    The error ``w - s (q - z)`` is split into a part that is taken as given, ``v = shrink(w - s (q - z))`` (the
    proximal step of the l_p "norm", p < 1: large errors stay in v, small ones vanish), and the rest, for which s and
    z are a least-squares fit of ``w - v`` on the codes. The two steps alternate while the penalty beta grows.

    Departures from the paper, which keeps s and moves a real-valued z: both are fitted where zero points are real
    numbers (`Spec.float_zero`). Where they are codes, z would move by less than half a code from round to round, hence
    never: so s is fitted, once for each of the zero points next to the first one; with a symmetric spec there is but
    one. Errors are measured in steps, so that beta means the same for
    every weight. The iteration is local, hence it starts from the clip search and keeps, per scale, the round with the
    smallest squared error.

    When to use: 2 to 4 bits without calibration data.
    Options: p, exponent of the norm; beta, its penalty; growth of beta per round; iterations.
    Source: Badri and Shaji, "Half-quadratic quantization of large machine learning models" (2023).
    """

    p: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    iterations: int = 20

    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError("p is above 0 and at most 1")

    def __call__(self, w: Array, spec: Spec, stats: WeightStats | None = None) -> QArray:  # noqa: ARG002 - protocol
        """Return the codes of ``w`` [out, in]; ``stats`` are not looked at."""
        if spec.pair_limit:
            return pair_safe(w, spec)
        start = params_from_range(mse_range(w, spec), spec)
        if not spec.format.scale_levels:
            return quantize(w, start)
        shape, granularity = (w.shape[0], w.shape[1]), spec.granularity
        groups = to_groups(np.asarray(w, dtype=np.float32), granularity)
        found = [self._fit(groups[rows], row_spec(spec)) for rows in chunks(groups)]
        scale = from_groups(np.concatenate([params.scale for params in found]), granularity, shape)
        zero_point = start.zero_point
        if zero_point is not None:
            rows = np.concatenate([np.asarray(params.zero_point) for params in found])
            zero_point = from_groups(rows, granularity, shape).astype(spec.zero_dtype)
        return quantize(w, params_from_scale(scale, spec, zero_point))

    def _fit(self, x: F32, spec: Spec) -> QParams:
        """Return the parameters of the rows of ``x`` [g, e]."""
        start = best = params_from_range(mse_range(x, spec), spec)
        unit = start.scale
        least = np.full(unit.shape, np.inf)
        for params in _zero_points(start):
            for i in range(self.iterations + 1):
                codes = quantize(x, params)
                error = x - dequantize(codes)
                cost = np.einsum("ge,ge->g", error, error)[:, None]
                best = _choose(cost < least, params, best)
                least = np.minimum(cost, least)
                outliers = unit * shrink(error / unit, self.beta * self.growth**i, self.p)
                params = (_fit_line if spec.float_zero else _fit_scale)(x - outliers, codes)
        return best


def _zero_points(start: QParams) -> list[QParams]:
    """Return ``start`` and, where the zero point is a code and free, the same with its neighbours."""
    if start.zero_point is None or start.spec.symmetric or start.spec.float_zero:
        return [start]
    low, high = start.spec.qmin, start.spec.qmax
    moved = [np.clip(start.zero_point + np.float32(shift), low, high).astype(np.float32) for shift in (0, -1, 1)]
    return [replace(start, zero_point=zero_point) for zero_point in moved]


def shrink(x: F32, beta: float, p: float) -> F32:
    """Return ``sign(x) max(|x| - |x|^(p-1) / beta, 0)``, the generalized soft threshold of the l_p norm."""
    magnitude = np.abs(x)
    with np.errstate(divide="ignore"):
        return np.asarray(np.sign(x) * np.maximum(magnitude - magnitude ** np.float32(p - 1) / np.float32(beta), 0))


def _fit_scale(target: F32, codes: QArray) -> QParams:
    """Return the parameters of ``codes`` with the least-squares fit of ``target`` [g, e] by ``s (q - z)`` as scale.

    A scale that comes out as no positive number stays as it was.
    """
    params = codes.params
    levels = dequantize(codes) / params.scale
    power = np.einsum("ge,ge->g", levels, levels)[:, None]
    slope = np.einsum("ge,ge->g", levels, target)[:, None] / np.where(power > 0, power, 1)
    return params_from_scale(np.where(slope > 0, slope, params.scale), params.spec, params.zero_point)


def _fit_line(target: F32, codes: QArray) -> QParams:
    """Return the parameters of ``codes`` with the least-squares fit of ``target`` [g, e] by ``s (q - z)``, s and z.

    Where s comes out as no positive number, both stay as they were.
    """
    params, levels = codes.params, codes.q.astype(np.float32)
    middle, mean = levels.mean(axis=1, keepdims=True), target.mean(axis=1, keepdims=True)
    levels = levels - middle
    power = np.einsum("ge,ge->g", levels, levels)[:, None]
    slope = np.einsum("ge,ge->g", levels, target)[:, None] / np.where(power > 0, power, 1)
    fits = slope >= SMALLEST_SCALE
    zero_point = np.where(fits, middle - mean / np.where(fits, slope, 1), np.asarray(params.zero_point))
    return params_from_scale(np.where(fits, slope, params.scale), params.spec, zero_point.astype(np.float32))


def _choose(better: npt.NDArray[np.bool_], ours: QParams, theirs: QParams) -> QParams:
    zero_point = None
    if ours.zero_point is not None:
        zero_point = np.where(better, ours.zero_point, np.asarray(theirs.zero_point))
    return replace(ours, scale=np.where(better, ours.scale, theirs.scale), zero_point=zero_point)


WEIGHT_METHODS.add("hqq", Hqq())
