"""Floating-point formats that a tensor is cast to: no scale, no Q/DQ.

Cast rounds half to even and overflows to infinity: a float16 beyond 65504 is lost, so whoever converts looks at the
calibrated ranges first. float32 is what qpipe computes in; float64 is here as a reference to compare with.

Source: IEEE 754-2019, table 3.5; ONNX operator Cast.
"""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np
import numpy.typing as npt

from . import FORMATS, Format


def _cast(name: str, dtype: npt.DTypeLike, onnx_type: str, largest: float, min_opset: int = 10) -> None:
    FORMATS.add(
        name,
        Format(
            name=name,
            bits=8 * np.dtype(dtype).itemsize,
            kind="float",
            qmin=-largest,
            qmax=largest,
            dtype=dtype,
            onnx_type=onnx_type,
            min_opset=min_opset,
            lowering="cast",
            scale_levels=0,
            source="IEEE 754-2019" if name != "bfloat16" else "ONNX operator Cast",
        ),
    )


_cast("float16", np.float16, "FLOAT16", 65504.0)
_cast("bfloat16", ml_dtypes.bfloat16, "BFLOAT16", float.fromhex("0x1.fep127"), min_opset=13)
_cast("float32", np.float32, "FLOAT", float.fromhex("0x1.fffffep127"))
_cast("float64", np.float64, "DOUBLE", sys.float_info.max)
