"""OpenVINO on CPUs.

Q/DQ become FakeQuantize and then integer kernels; MatMulInteger is computed in float. Its int8 kernels saturate on x86
CPUs without VNNI as ONNX Runtime's do. uint16 activations give wrong values.
"""

from __future__ import annotations

from ...calibrate.weights.pairs import PAIR_LIMIT
from ..cpu import int8_saturates
from ..layouts import RECURRENT
from . import PRODUCTS, TARGETS, Target, qdq_formats
from .portable import COMPUTE, ELEMENTWISE, MOVES

_LATEST = 24
"""Opset of the newest number formats that it reads: no integers of 2 bits (25), no floats of 6 (28)."""
_TWICE = "it rounds to float16 before it rounds to float8: some 4 of 1000 codes fall one beside"
_UNREAD = ("int2", "uint2", "float4_e2m1", "float6_e2m3", "float6_e3m2", "float8_e4m3fnuz", "float8_e5m2fnuz")

TARGETS.add(
    "openvino",
    Target(
        name="openvino",
        summary="OpenVINO on CPUs",
        kernels=COMPUTE | ELEMENTWISE | MOVES,
        needs_output=frozenset({"Conv", "ConvTranspose"}),
        forms={"weights": PRODUCTS | RECURRENT},
        refused={
            "uint16": "it computes wrong values with uint16 activations; int16 is right",
            **dict.fromkeys(("int4", "uint4"), "quantizers of 4 bits crash it"),
            **dict.fromkeys(_UNREAD, "it reads no quantizers of this type"),
        },
        emulated={
            "int16": "it has no kernels for 16-bit codes and computes in float",
            **dict.fromkeys(("float8_e4m3fn", "float8_e5m2"), _TWICE),
        },
        weight_formats=qdq_formats(_LATEST, "float8_e4m3fnuz", "float8_e5m2fnuz", "uint16"),
        scale_formats=frozenset({"float8_e8m0", "float8_e4m3fn"}),
        pair_limit=PAIR_LIMIT if int8_saturates() else 0,
        notes=(
            "on CPUs with VNNI its weight-only products round activations to 8 bits in groups, unless the session sets "
            "DYNAMIC_QUANTIZATION_GROUP_SIZE to 0",
        ),
        evidence="openvino",
        source="OpenVINO 2026.4, CPU plugin: its runtime model and capability table as measured",
    ),
)
