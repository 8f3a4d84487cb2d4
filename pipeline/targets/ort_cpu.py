"""ONNX Runtime's CPU provider.

Its optimizer turns DQ, DQ -> MatMul into MatMulIntegerToFloat, which keeps a float output, so no quantizer stands
behind a MatMul; Conv becomes QLinearConv only with a quantizer behind it and an int32 bias. ConvTranspose has no
integer kernel there.
"""

from __future__ import annotations

from . import TARGETS, Target
from .portable import COMPUTE, ELEMENTWISE, MOVES

TARGETS.add(
    "ort-cpu",
    Target(
        name="ort-cpu",
        summary="ONNX Runtime on CPUs: what its optimizer turns into integer kernels",
        kernels=(COMPUTE - {"ConvTranspose"}) | ELEMENTWISE | MOVES | {"LeakyRelu", "Sigmoid"},
        needs_output=frozenset({"Conv"}),
        int32_bias=frozenset({"Conv", "Gemm"}),
        source="ONNX Runtime 1.31, QDQ selectors of the CPU provider",
    ),
)
