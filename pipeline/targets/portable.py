"""Any runtime that reads QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from . import TARGETS, Target

COMPUTE = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
ELEMENTWISE = frozenset({"Add", "Mul", "AveragePool", "GlobalAveragePool"})
MOVES = frozenset(
    {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "MaxPool", "Concat", "Relu", "Clip", "Split", "Slice"}
)

TARGETS.add(
    "portable",
    Target(
        name="portable",
        summary="standard QuantizeLinear/DequantizeLinear only, for any runtime",
        kernels=COMPUTE | ELEMENTWISE | MOVES,
        needs_output=frozenset({"Conv", "ConvTranspose"}),
        int32_bias=frozenset({"Conv", "Gemm"}),
        source="ONNX operators QuantizeLinear and DequantizeLinear",
    ),
)
