"""Floating-point formats of 4 and 6 bits: no infinity, no NaN, everything too large saturates.

NaN has no code; a cast gives it the one of minus zero. It must not reach a quantizer.

Source: OCP Microscaling Formats specification 1.0, sections 5.3.2 and 5.3.3; ONNX "Float stored in 4 bits".
"""

from __future__ import annotations

import ml_dtypes
import numpy.typing as npt

from . import FORMATS, Format


def _small_float(layout: str, dtype: npt.DTypeLike, largest: float, min_opset: int) -> Format:
    bits = int(layout[1]) + int(layout[3]) + 1
    return FORMATS.add(
        f"float{bits}_{layout}",
        Format(
            name=f"float{bits}_{layout}",
            bits=bits,
            kind="float",
            qmin=-largest,
            qmax=largest,
            dtype=dtype,
            onnx_type=f"FLOAT{bits}{layout.upper()}",
            min_opset=min_opset,
            source="OCP Microscaling Formats 1.0, section 5.3",
        ),
    )


E2M1 = _small_float("e2m1", ml_dtypes.float4_e2m1fn, 6.0, 23)
E2M3 = _small_float("e2m3", ml_dtypes.float6_e2m3fn, 7.5, 28)
E3M2 = _small_float("e3m2", ml_dtypes.float6_e3m2fn, 28.0, 28)
