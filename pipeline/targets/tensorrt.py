"""NVIDIA TensorRT 11: explicit Q/DQ only, strongly typed.

What is not between Q/DQ runs in the type that the graph says, so the remainder has to be float16 or bfloat16 in the
file to run as such (`Recipe.float_type`). Codes are symmetric. Weights are per channel, or int4 in blocks with float
activations; biases stay in float. No quantizer stands behind a product: TensorRT fuses what follows it in float.
"""

from __future__ import annotations

from . import PRODUCTS, TARGETS, Target, qdq_formats

_NARROW = "its quantized products take int8 and float8 e4m3 activations only"

TARGETS.add(
    "tensorrt",
    Target(
        name="tensorrt",
        summary="NVIDIA TensorRT 11: explicit symmetric Q/DQ, float16 or bfloat16 remainder",
        activation_format="int8",
        activation_symmetric=True,
        asymmetric=False,
        kernels=PRODUCTS,
        forms={"weights": PRODUCTS},
        refused=dict.fromkeys(qdq_formats(28) - {"int8", "float8_e4m3fn"}, _NARROW),
        scale_formats=frozenset({"float8_e8m0", "float8_e4m3fn"}),
        weight_formats=frozenset({"int8", "int4", "float8_e4m3fn", "float4_e2m1", "nvfp4", "mxfp8_e4m3"}),
        evidence="tensorrt",
        source="NVIDIA TensorRT 11, Working with Quantized Types and migration guide from version 10; not run here",
        notes=(
            "calibrators and precision flags are gone since version 11: float_type: float16 converts the remainder",
            "float8 needs Ada, Hopper or newer; int4 and float4 weights are stored in blocks",
        ),
    ),
)
