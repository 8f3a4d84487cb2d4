"""ONNX Runtime's CPU provider.

Its optimizer turns DQ, DQ -> MatMul into MatMulIntegerToFloat, which keeps a float output, so no quantizer stands
behind a MatMul; Conv becomes QLinearConv only with a quantizer behind it and an int32 bias. ConvTranspose has no
integer kernel there. DynamicQuantizeLinear, MatMulInteger, Cast and Mul become DynamicQuantizeMatMul, or
MatMulIntegerToFloat where several products share one quantizer.
"""

from __future__ import annotations

from ...calibrate.formats.codebook import BNB4_QUANT_TYPE
from ...calibrate.weights.pairs import PAIR_LIMIT
from ..cpu import int8_saturates
from ..layouts import RECURRENT
from . import MATRIX_PRODUCTS, PRODUCTS, TARGETS, Target, qdq_formats
from .portable import COMPUTE, ELEMENTWISE, MOVES

_KERNELS = (COMPUTE - {"ConvTranspose"}) | ELEMENTWISE | MOVES | {"LeakyRelu", "Sigmoid"}
_FLOAT8 = (
    "its optimizer fuses float8 Q/DQ around a MatMul into an operator that takes no float8, and then refuses the model"
)
_SHORT = (
    "its optimizer fuses Q/DQ of 2 and 4 bits around a product into an operator that takes none, and then refuses the "
    "model"
)
_WIDE = "it has no kernels for 16-bit codes: Q/DQ run as they stand around float products, slower than float"


def _add(name: str, summary: str, pair_limit: int) -> None:
    TARGETS.add(
        name,
        Target(
            name=name,
            summary=summary,
            kernels=_KERNELS,
            needs_output=frozenset({"Conv"}),
            int32_bias=frozenset({"Conv", "Gemm"}),
            forms={
                "weights": PRODUCTS | RECURRENT,
                "recurrent": frozenset({"LSTM"}),
                "dynamic": MATRIX_PRODUCTS,
                "nbits": MATRIX_PRODUCTS,
                "bnb4": MATRIX_PRODUCTS,
                "outlier": MATRIX_PRODUCTS,
            },
            weight_formats=qdq_formats(25, "float4_e2m1", "mxfp4", "nvfp4") | set(BNB4_QUANT_TYPE),
            refused={
                **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"), _FLOAT8),
                **dict.fromkeys(("int2", "uint2", "int4", "uint4"), _SHORT),
                **dict.fromkeys(("float4_e2m1", "float6_e2m3", "float6_e3m2"), "it has no kernels of this type"),
            },
            emulated={"int16": _WIDE, "uint16": _WIDE},
            accuracy_level=4,
            float_zero_bits=frozenset({4}),
            float_types=frozenset({"float32", "float16"}),
            half_scales=False,
            # Without a float16 kernel these are taken apart into several operators each, twice the time of float32.
            float32_ops=frozenset({"Softmax", "LogSoftmax", "Gelu", "HardSwish", "Mish", "Softplus", "Celu"}),
            pair_limit=pair_limit,
            fuses_blocks=False,
            passes=frozenset({"keep_sums_apart", "floor_masked_softmax", "sum_behind_products"}),
            source="ONNX Runtime 1.31, CPU provider: its optimized graphs and capability table as measured",
            notes=(
                "float16 saves memory there, not time: most operators are computed in float32 between casts",
                "attention stays as exported: MultiHeadAttention is no faster, Attention slower with masked keys",
                "MatMulNBits unpacks weights with float zero points on every run: half the speed with many rows, a "
                "hundredth with one",
                "ConvInteger takes as long as a float Conv or longer, so dynamic schemes leave Conv in float",
            ),
        ),
    )


_add("ort-cpu", "ONNX Runtime on CPUs like this one", PAIR_LIMIT if int8_saturates() else 0)
_add("ort-cpu-avx2", "ONNX Runtime on x86 CPUs without VNNI: weights keep its int8 kernels from saturating", PAIR_LIMIT)
_add("ort-cpu-vnni", "ONNX Runtime on CPUs whose int8 kernels are exact (x86 with VNNI, Arm)", 0)
