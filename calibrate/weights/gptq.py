"""GPTQ: round the columns one after the other, and let the columns still to come make up for the error.

With ``H = XᵀX / tokens + damping`` and ``R`` upper triangular such that ``H⁻¹ = Rᵀ R``: rounding column k leaves the
error ``e = (w_k - q_k) / R_kk``, and the output changes least if every later column j becomes ``w_j - e R_kj``.

Letters: ``out``, ``in`` dimensions of the weight, ``n`` = ``in``, ``r`` rows (output channels) solved at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..qarray import F32, F64, QArray, QParams, Spec, params_from_range, params_from_scale, quantize
from ..stats.gram import Gram
from . import WEIGHT_METHODS, WeightStats, gram_of
from .grid import Grid
from .pairs import pair_safe
from .search import mse_range

Array = npt.NDArray[Any]

_CHUNK = 1 << 22
"""Weights solved at once, each held in float64. Rows do not depend on each other."""


@dataclass(frozen=True, slots=True)
class Gptq:
    """What: codes that are worse for the weights and better for the layer's output, by second-order compensation.

    Scales are searched with the squared error of each column weighted by ``1 / R_kk²``, which is what that error costs
    at the output once the later columns have made up for it.

    When to use: 2 to 4 bits with calibration data: some thousand tokens, and at least twice as many as ``in``. Where a
        few channels of x stick out, equalize first (``awq`` or ``smoothquant``).
    Options: damping, share of the energy of each channel that is added to it (the paper adds a share of the mean, so
        that one outlier channel drowns all others, and results depend on how channels are scaled); act_order, columns
        with the most energy first, all scales being chosen beforehand ("static groups"). Without it columns go in
        their own order, and the scale of a block is chosen when its turn comes, from the columns as updated so far.
    Source: Frantar et al., "GPTQ: accurate post-training quantization for generative pre-trained transformers",
        algorithm 1 (2022).
    """

    damping: float = 0.05
    act_order: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ValueError("damping is 0 or more")

    def __call__(self, w: Array, spec: Spec, stats: WeightStats | None = None) -> QArray:
        """Return the codes of ``w`` [out, in]."""
        hessian = damped(gram_of("gptq", w, stats), self.damping)
        order = np.argsort(-np.diag(hessian), kind="stable") if self.act_order else np.arange(len(hessian))
        hessian = hessian[np.ix_(order, order)]
        factor = inverse_factor(hessian)
        importance = np.empty(len(order))
        importance[order] = 1 / np.square(np.diag(factor))
        params = _params(w, spec, importance)
        block = 0 if self.act_order else _late_block(spec)
        values, late = np.empty(w.shape, np.float32), []
        for rows in _row_chunks(w.shape):
            columns = _Columns(
                live=np.ascontiguousarray(w[rows].T[order], dtype=np.float64),
                grid=Grid.of(params, w.shape, rows, order),
                factor=factor,
                importance=importance,
                neighbour=_neighbours(order) if spec.pair_limit else None,
                block=block,
            )
            values[rows][:, order] = columns.solve().T
            if block:
                late.append([each[::block].T for each in (columns.grid.scale, columns.grid.zero_point)])
        if late:
            scale, zeros = (np.concatenate(each) for each in zip(*late, strict=True))
            params = params_from_scale(
                scale, spec, None if params.zero_point is None else zeros.astype(spec.zero_dtype)
            )
        return quantize(values, params)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """The columns of some rows on their way from real numbers to codes; the arrays are worked on in place.

    Attributes:
        live: [n, r], the updated weights; once a column is rounded, its error ``e``.
        grid: Scales, zero points [n, r].
        factor: R, [n, n].
        importance: [n], see `Gptq`; only for blocks, whose columns are in their own order.
        neighbour: [n], the column with which each shares the ``pair_limit`` of the spec; None without one.
        block: Columns whose scale is chosen when their turn comes, 0 when the grid already holds it.
    """

    live: F64
    grid: Grid
    factor: F64
    importance: F64
    neighbour: npt.NDArray[np.intp] | None
    block: int

    def solve(self) -> F32:
        """Return the rounded weights [n, r]."""
        values = np.empty(self.live.shape, np.float32)
        if values.size:
            self._solve(0, len(values), values)
        return values

    def _solve(self, lo: int, hi: int, values: F32) -> None:
        """Round columns lo to hi, which carry the errors of all columns before lo.

        Halving takes the place of the paper's lazy batches: at every size, the errors of the first half reach the
        second in one matrix product. It never cuts through a block, so that a block is up to date when it is entered.
        """
        width = hi - lo
        if self.block and lo % self.block == 0 and width == min(self.block, len(values) - lo):
            self._choose_scale(lo, hi)
        if width == 1:
            mate = lo if self.neighbour is None else self.neighbour[lo]
            values[lo] = self.grid.round(lo, self.live[lo], values[mate] if mate < lo else None)
            self.live[lo] -= values[lo]
            self.live[lo] /= self.factor[lo, lo]
            return
        middle = lo + width // 2
        if self.block and width > self.block:
            middle = lo + self.block * -(-width // self.block // 2)
        self._solve(lo, middle, values)
        self.live[middle:hi] -= self.factor[lo:middle, middle:hi].T @ self.live[lo:middle]
        self._solve(middle, hi, values)

    def _choose_scale(self, lo: int, hi: int) -> None:
        spec = self.grid.spec
        columns = self.live[lo:hi].T.astype(np.float32)
        params = params_from_range(mse_range(columns, spec, self.importance[lo:hi]), spec)
        self.grid.scale[lo:hi] = params.scale[:, 0]
        if params.zero_point is not None:
            self.grid.zero_point[lo:hi] = params.zero_point[:, 0]


def damped(gram: Gram, damping: float) -> F64:
    """Return ``XᵀX / tokens`` [n, n] plus ``damping`` times its diagonal, ready to be factored.

    An input that was always zero says nothing about its column: it gets the mean energy, meets no other column, and
    so its weights are rounded to nearest (zeroing them would change the model on inputs that calibration missed).
    """
    hessian = gram.matrix / max(gram.tokens, 1)
    energy = np.diag(hessian)
    dead = energy <= 0
    mean = float(energy[~dead].mean()) if not dead.all() else 1.0
    hessian[np.diag_indices(len(hessian))] += np.where(dead, mean, damping * energy)
    return hessian


def inverse_factor(hessian: F64) -> F64:
    """Return the upper triangular R, ``hessian⁻¹ = Rᵀ R``, both [n, n].

    Turned around, a lower Cholesky factor is the upper ``U`` of ``hessian = U Uᵀ``, and ``R = U⁻¹``: no inverse of the
    whole matrix is formed.

    Raises:
        DataError: The matrix is not positive definite.
    """
    try:
        upper = np.ascontiguousarray(np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1])
    except np.linalg.LinAlgError as error:
        raise DataError(
            "the Gram matrix of a layer's input is singular",
            expected="more tokens than input channels, or damping",
            do="calibrate on more samples, or write gptq:0.1 for a damping of 0.1",
        ) from error
    _invert_upper(upper)
    return upper


def _invert_upper(upper: F64) -> None:
    """Put the inverse of an upper triangular matrix [n, n] in its place: a second one may be half a gigabyte."""
    half = len(upper) // 2
    if half <= 32:
        upper[:] = np.triu(np.linalg.inv(upper))
        return
    _invert_upper(upper[:half, :half])
    _invert_upper(upper[half:, half:])
    upper[:half, half:] = -upper[:half, :half] @ (upper[:half, half:] @ upper[half:, half:])


def _params(w: Array, spec: Spec, importance: F64) -> QParams:
    if spec.pair_limit:
        return pair_safe(w, spec, importance).params
    return params_from_range(mse_range(w, spec, importance), spec)


def _neighbours(order: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Return, for each place in ``order`` [n], the place of the other column of its pair: 0 and 1, 2 and 3, ..."""
    places = np.argsort(order)
    mates = order ^ 1
    alone = mates >= len(order)
    return np.where(alone, np.arange(len(order)), places[np.where(alone, 0, mates)])


def _late_block(spec: Spec) -> int:
    """Return the block size if a block's scale can be chosen when its turn comes, else 0.

    A scale that is stored relative to one of the whole tensor (two levels) cannot.
    """
    along_input = spec.granularity.axis in (1, -1)
    return spec.granularity.block_size if along_input and spec.format.scale_levels == 1 else 0


def _row_chunks(shape: tuple[int, ...]) -> list[slice]:
    step = max(1, _CHUNK // max(1, shape[1]))
    return [slice(start, start + step) for start in range(0, shape[0], step)]


WEIGHT_METHODS.add("gptq", Gptq())
