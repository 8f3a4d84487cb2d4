"""ONNX Runtime's CUDA provider.

It has no QLinear kernels: Q/DQ around a product run as they stand, beside a product in float, and DynamicQuantizeLinear
goes to the CPU and back. What gains there are packed weights (MatMulNBits, MatMulBnb4) and half precision.
"""

from __future__ import annotations

from . import MATRIX_PRODUCTS, TARGETS, Target

TARGETS.add(
    "ort-cuda",
    Target(
        name="ort-cuda",
        summary="ONNX Runtime on NVIDIA GPUs: packed weights and half precision",
        forms={
            "weights": MATRIX_PRODUCTS,
            "nbits": MATRIX_PRODUCTS,
            "bnb4": MATRIX_PRODUCTS,
            "outlier": MATRIX_PRODUCTS,
        },
        float_zero_bits=frozenset({4}),
        half_scales=True,
        evidence="ort-cuda",
        source="microsoft/onnxruntime issues 12229, 24807, 15260 and pull request 21846; not run here",
        notes=("int8 activations gain through the OutlierMatMul plugin only (w8a8-outlier), or with TensorRT",),
    ),
)
