"""Integer formats of 2 to 16 bits.

Source: ONNX operators QuantizeLinear and DequantizeLinear, type constraint T1/T2 at opsets 10, 21 and 25.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

from . import FORMATS, Format


def _integer(bits: int, signed: bool, dtype: npt.DTypeLike, min_opset: int) -> None:
    name = f"{'' if signed else 'u'}int{bits}"
    FORMATS.add(
        name,
        Format(
            name=name,
            bits=bits,
            kind="int" if signed else "uint",
            qmin=-(2 ** (bits - 1)) if signed else 0,
            qmax=2 ** (bits - 1) - 1 if signed else 2**bits - 1,
            dtype=dtype,
            onnx_type=name.upper(),
            min_opset=min_opset,
            source="ONNX QuantizeLinear",
        ),
    )


_integer(2, True, ml_dtypes.int2, 25)
_integer(2, False, ml_dtypes.uint2, 25)
_integer(4, True, ml_dtypes.int4, 21)
_integer(4, False, ml_dtypes.uint4, 21)
_integer(8, True, np.int8, 10)
_integer(8, False, np.uint8, 10)
_integer(16, True, np.int16, 21)
_integer(16, False, np.uint16, 21)
