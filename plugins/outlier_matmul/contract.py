"""Contract of ``qpipe.OutlierMatMul`` and its numpy reference: the definition that every kernel is tested against.

A few feature columns of an activation are tens of times larger than the rest and ruin a shared scale. They are
multiplied in floating point with the original weights; everything else in int8, with one scale per row of X and one
per output column.

    Y[m, n] = scale[m] * w_scale[n] * sum_k q[m, k] * w_q[n, k]  +  sum_o X[m, index[o]] * w_outlier[n, o]  +  bias[n]

Letters: ``M`` rows of X (all its leading dimensions), ``K`` inputs, ``N`` outputs, ``O`` outlier columns; ``Kp`` and
``Op`` are K and O rounded up to a multiple of 16; ``T`` is X's type: float32, float16 or bfloat16.

=====  =================  ===================  ====================================================================
input  name               type and shape       meaning
=====  =================  ===================  ====================================================================
0      ``x``              T [.., K]            activations, any rank >= 1
1      ``w_q``            int8 [N, Kp]         codes in -127..127; 0 in outlier and padding columns
2      ``w_scale``        float32 [N]          scale of each output column, over its regular weights only
3      ``outlier_index``  int32 [O]            outlier columns, ascending, unique; O may be 0
4      ``w_outlier``      T [N, Op]            their original weights; 0 in padding columns
5      ``bias``           float32 [N]          optional
=====  =================  ===================  ====================================================================

Output 0 ``y``: T [.., N]. Output 1 ``new_outliers`` (optional): int64 [], how many regular elements of X were beyond
``limit`` in this run. Attributes: ``limit`` (float, default 0 = off), ``padding`` (int, default 16).

The rounding rule, all in float32, "/" being IEEE division and ``rint`` rounding half to even:

- ``scale[m] = max(amax / 127, 2^-126)``, ``amax`` over the row's regular columns; a zero row has only zero codes.
- ``q[m, k] = clip(rint(x * (1 / scale)), -127, 127)``; 0 in outlier columns.
- A row whose regular columns hold an infinity or a NaN gives NaN everywhere. In outlier columns they follow float
  arithmetic.
- New outliers: with ``limit > 0``, a row that holds 1 to 64 regular elements beyond ``limit`` leaves them out of its
  ``amax``, and their codes use two int8 digits, ``q = 128 * high + low``, |q| <= 16319. The scale then is
  ``max(amax / 127, largest / 16319, 2^-126)``. With more than 64 the row as a whole is loud: one digit, all columns.

Source: Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ...calibrate.errors import UnsupportedError
from ...calibrate.formats import FORMATS
from ...calibrate.granularity import Granularity
from ...calibrate.qarray import SMALLEST_SCALE, Range, Spec, params_from_range, quantize

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]

DOMAIN = "qpipe"
OP_TYPE = "OutlierMatMul"
VERSION = 1
INPUTS = ("x", "w_q", "w_scale", "outlier_index", "w_outlier", "bias")
OUTPUTS = ("y", "new_outliers")

PADDING = 16
ONE_DIGIT = 127
TWO_DIGITS = 127 * 128 + 63
"""Largest code of a new outlier: 128 * 127 + 63, so that both digits stay in int8."""
MAX_NEW_OUTLIERS = 64
"""New outliers per row up to which they get two digits; also keeps every sum below 2^31 up to K = 120,000."""

X_TYPES: tuple[np.dtype[Any], ...] = (
    np.dtype(np.float32),
    np.dtype(np.float16),
    np.dtype(ml_dtypes.bfloat16),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Constant inputs 1 to 4 of the operator, in order.

    Attributes:
        w_q: int8 [N, Kp].
        w_scale: float32 [N].
        outlier_index: int32 [O].
        w_outlier: T [N, Op].
    """

    w_q: npt.NDArray[np.int8]
    w_scale: F32
    outlier_index: npt.NDArray[np.int32]
    w_outlier: Array

    def inputs(self) -> dict[str, Array]:
        """Return the arrays by input name, in the operator's order."""
        return {name: getattr(self, name) for name in INPUTS[1:5]}


class RowCodes(NamedTuple):
    """Quantized rows: ``codes`` int32 [M, K], ``scale`` float32 [M] (NaN: the row is poisoned), new outliers met."""

    codes: npt.NDArray[np.int32]
    scale: F32
    new_outliers: int


def padded(size: int, padding: int = PADDING) -> int:
    """Return ``size`` rounded up to a multiple of ``padding``."""
    return -(-size // padding) * padding


def pack(w: Array, outlier_index: npt.ArrayLike, x_dtype: npt.DTypeLike, *, padding: int = PADDING) -> Packed:
    """Split a weight into int8 codes and the original weights of the outlier columns.

    Args:
        w: Weight [N, K] (output rows, input columns), any float type.
        outlier_index: Input columns that stay in floating point, in any order.
        x_dtype: Type of the activations, which is the type of ``w_outlier``.
        padding: K and O are rounded up to a multiple of it; a multiple of 16.

    Raises:
        UnsupportedError: The activation type, shape, index or padding is not one that the operator takes.
    """
    x_type = np.dtype(x_dtype)
    if x_type not in X_TYPES:
        raise UnsupportedError(
            "OutlierMatMul does not take this activation type", found=x_type.name, expected="float32, float16, bfloat16"
        )
    if w.ndim != 2 or padding % PADDING or padding < PADDING:
        raise UnsupportedError(
            "OutlierMatMul needs a two-dimensional weight [N, K] and a padding that is a multiple of 16",
            found=f"weight {list(w.shape)}, padding {padding}",
        )
    outputs, inputs = w.shape
    index = _checked_index(outlier_index, inputs)
    w32 = np.asarray(w, dtype=np.float32)
    regular = w32.copy()
    regular[:, index] = 0
    spec = Spec(format=FORMATS.get("int8"), granularity=Granularity(axis=0), narrow_range=True)
    amax = np.abs(regular).max(axis=1, keepdims=True, initial=0)
    quantized = quantize(regular, params_from_range(Range.of(-amax, amax), spec))
    w_q = np.zeros((outputs, padded(inputs, padding)), np.int8)
    w_q[:, :inputs] = quantized.q
    w_outlier = np.zeros((outputs, padded(index.size, padding)), x_type)
    w_outlier[:, : index.size] = w32[:, index].astype(x_type)
    return Packed(w_q=w_q, w_scale=quantized.params.scale.reshape(outputs), outlier_index=index, w_outlier=w_outlier)


def quantize_rows(x: Array, outlier_index: npt.NDArray[np.int32], *, limit: float = 0.0) -> RowCodes:
    """Quantize the regular columns of ``x [M, K]`` by the rounding rule of this module.

    Args:
        x: Activations [M, K], any of `X_TYPES`.
        outlier_index: Columns [O] that are left out; their codes are 0.
        limit: Calibrated amplitude of the regular columns; 0 turns new-outlier handling off.
    """
    regular = np.array(x, dtype=np.float32)
    regular[:, outlier_index] = 0
    poisoned = ~np.isfinite(regular).all(axis=1)
    magnitude = np.abs(regular)
    beyond = magnitude > np.float32(limit) if limit > 0 else np.zeros(regular.shape, bool)
    met = beyond.sum(axis=1)
    wide = beyond & (met <= MAX_NEW_OUTLIERS)[:, None]
    bound = np.where(wide, TWO_DIGITS, ONE_DIGIT).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        scale = np.maximum((magnitude / bound).max(axis=1, initial=0), SMALLEST_SCALE)
        codes = np.clip(np.rint(regular * (np.float32(1) / scale)[:, None]), -bound, bound)
    codes[poisoned] = 0
    scale[poisoned] = np.nan
    return RowCodes(codes.astype(np.int32), scale, int(met.sum()))


def reference(
    x: Array, packed: Packed, bias: F32 | None = None, *, limit: float = 0.0
) -> tuple[Array, npt.NDArray[np.int64]]:
    """Compute the operator: integer sums exactly, the rest in float64, one rounding to T at the end.

    Args:
        x: Activations T [.., K].
        packed: Constant inputs.
        bias: float32 [N] or None.
        limit: Attribute ``limit``.

    Returns:
        ``y`` T [.., N] and ``new_outliers`` int64 [].
    """
    inputs, outputs = x.shape[-1], packed.w_q.shape[0]
    rows = x.reshape(-1, inputs)
    row = quantize_rows(rows, packed.outlier_index, limit=limit)
    count = packed.outlier_index.size
    # Sums are below 2^53, so that float64 holds them exactly in any order.
    sums = row.codes.astype(np.float64) @ packed.w_q[:, :inputs].T.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        y = sums * row.scale[:, None].astype(np.float64) * packed.w_scale.astype(np.float64)
        if count:
            y += rows[:, packed.outlier_index].astype(np.float64) @ packed.w_outlier[:, :count].T.astype(np.float64)
        if bias is not None:
            y += bias.astype(np.float64)
        result = y.astype(x.dtype).reshape(*x.shape[:-1], outputs)
    return result, np.array(row.new_outliers, np.int64)


def _checked_index(outlier_index: npt.ArrayLike, inputs: int) -> npt.NDArray[np.int32]:
    given = np.asarray(outlier_index, dtype=np.int64).reshape(-1)
    index = np.unique(given)
    if index.size != given.size or (index.size and not 0 <= index[0] <= index[-1] < inputs):
        raise UnsupportedError(
            "outlier columns must be unique and inside the weight",
            found=f"{given.size} columns, {given.tolist()[:8]} ...",
            expected=f"unique numbers from 0 to {inputs - 1}",
        )
    return index.astype(np.int32)
