"""Codebook formats: 16 values looked up by a 4-bit code, relative to the largest magnitude of a block.

ONNX Runtime's ``com.microsoft.MatMulBnb4`` holds both tables and multiplies by them: ``A [M, K] @ W [N, K].T``. Its
blocks run over the *flattened* weight, so K must be a multiple of the block size if a block is not to straddle rows.

Source: Dettmers et al. 2023, "QLoRA", section 3 and appendix E (NF4: the quantiles of a normal distribution, with an
exact zero); for FP4 the values that MatMulBnb4 computes with: 2, 3, 4, 6, 8 and 12 twelfths, zero, and 1/192.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from . import FORMATS, Format

BNB4_QUANT_TYPE = {"bnb_fp4": 0, "nf4": 1}
"""Attribute ``quant_type`` of MatMulBnb4, by format."""

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_MAGNITUDES = tuple(float(np.float32(n / 192)) for n in (0, 1, 128, 192, 64, 96, 32, 48))
_FP4 = (*_FP4_MAGNITUDES, *(-m for m in _FP4_MAGNITUDES))


def _codebook(name: str, values: tuple[float, ...], source: str) -> None:
    FORMATS.add(
        name,
        Format(
            name=name,
            bits=4,
            kind="codebook",
            qmin=min(values),
            qmax=max(values),
            dtype=ml_dtypes.uint4,
            onnx_type="UINT8",
            lowering="bnb4",
            codebook=values,
            source=source,
        ),
    )


_codebook("nf4", _NF4, "Dettmers et al. 2023, QLoRA, appendix E")
_codebook("bnb_fp4", _FP4, "ONNX Runtime com.microsoft.MatMulBnb4, quant_type 0")


def pack_bnb4(codes: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Pack 4-bit codes as MatMulBnb4 wants its input B.

    Args:
        codes: [N, K] (``w [out, in]``), values 0 to 15; flattened in this order.

    Returns:
        Bytes [ceil(N * K / 2)]: the *first* of two codes in the *high* half, the other way round from ONNX's int4.
    """
    flat = codes.astype(np.uint8).ravel()
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return np.asarray(flat[0::2] << 4 | flat[1::2], dtype=np.uint8)


def unpack_bnb4(packed: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return the codes of ``shape`` that `pack_bnb4` packed."""
    flat = np.stack([packed >> 4, packed & 0x0F], axis=1).ravel()[: int(np.prod(shape))]
    return flat.reshape(shape).astype(ml_dtypes.uint4)
