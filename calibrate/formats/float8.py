"""Floating-point formats of 8 bits.

``e4m3`` means 4 bits of exponent and 3 of mantissa; ``fn`` finite (no infinity); ``uz`` one unsigned zero (the code of
minus zero is NaN instead). QuantizeLinear saturates to the largest finite value (``saturate=1``); NaN stays NaN.

Source: ONNX "Float stored in 8 bits"; Micikevicius et al. 2022, "FP8 Formats for Deep Learning", table 1; for the
fnuz pair Noune et al. 2022, "8-bit Numerical Formats for Deep Neural Networks"; for e8m0 the OCP Microscaling
Formats specification 1.0, section 5.4.1.
"""

from __future__ import annotations

import ml_dtypes
import numpy.typing as npt

from . import FORMATS, Format


def _float8(layout: str, dtype: npt.DTypeLike, largest: float) -> Format:
    return FORMATS.add(
        f"float8_{layout}",
        Format(
            name=f"float8_{layout}",
            bits=8,
            kind="float",
            qmin=-largest,
            qmax=largest,
            dtype=dtype,
            onnx_type=f"FLOAT8{layout.upper()}",
            min_opset=19,
            source="ONNX, Float stored in 8 bits",
        ),
    )


E4M3FN = _float8("e4m3fn", ml_dtypes.float8_e4m3fn, 448.0)
E5M2 = _float8("e5m2", ml_dtypes.float8_e5m2, 57344.0)
E4M3FNUZ = _float8("e4m3fnuz", ml_dtypes.float8_e4m3fnuz, 240.0)
E5M2FNUZ = _float8("e5m2fnuz", ml_dtypes.float8_e5m2fnuz, 57344.0)

E8M0 = FORMATS.add(
    "float8_e8m0",
    Format(
        name="float8_e8m0",
        bits=8,
        kind="float",
        qmin=2.0**-127,
        qmax=2.0**127,
        dtype=ml_dtypes.float8_e8m0fnu,
        onnx_type="FLOAT8E8M0",
        min_opset=24,
        lowering="scale",
        scale_levels=0,
        source="OCP Microscaling Formats 1.0, section 5.4.1",
    ),
)
