"""Any runtime that reads standard ONNX; OutlierMatMul brings its body along."""

from __future__ import annotations

from ..layouts import RECURRENT
from . import MATRIX_PRODUCTS, PRODUCTS, TARGETS, Target, qdq_formats

COMPUTE = PRODUCTS
ELEMENTWISE = frozenset({"Add", "Mul", "AveragePool", "GlobalAveragePool"})
SHAPES = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Expand", "Tile"})
PICKS = frozenset({"Concat", "Split", "Gather", "GatherElements", "Where", "DepthToSpace", "Resize"})
EXTREMES = frozenset({"MaxPool", "ReduceMax", "ReduceMin", "Relu", "Clip"})
MOVES = SHAPES | PICKS | EXTREMES
"""What ONNX Runtime's CPU provider runs on codes of 8 bits, pair for pair dropped by its optimizer."""
FURTHER_MOVES = frozenset({"GatherND", "GlobalMaxPool", "Pad", "SpaceToDepth", "TopK", "Upsample"})

TARGETS.add(
    "portable",
    Target(
        name="portable",
        summary="standard ONNX operators only, for any runtime",
        kernels=COMPUTE | ELEMENTWISE | MOVES | FURTHER_MOVES,
        needs_output=frozenset({"Conv", "ConvTranspose"}),
        int32_bias=frozenset({"Conv", "Gemm"}),
        refused=dict.fromkeys(("float6_e2m3", "float6_e3m2"), "they came with opset 28, which few runtimes read"),
        weight_formats=qdq_formats(25),
        forms={"weights": PRODUCTS | RECURRENT, "dynamic": MATRIX_PRODUCTS, "outlier": MATRIX_PRODUCTS},
        fuses_blocks=False,  # right by the standard, wrong in the runtime that most models meet
        source="ONNX operators QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear and MatMulInteger",
    ),
)
