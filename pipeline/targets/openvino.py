"""OpenVINO on CPUs.

Q/DQ become FakeQuantize and then integer kernels; MatMulInteger is computed in float. Its int8 kernels saturate on x86
CPUs without VNNI as ONNX Runtime's do. uint16 activations give wrong values.
"""

from __future__ import annotations

from ...calibrate.formats import FORMATS
from ...calibrate.weights.pairs import PAIR_LIMIT
from ..cpu import int8_saturates
from . import PRODUCTS, TARGETS, Target
from .portable import COMPUTE, ELEMENTWISE, MOVES

_TWO_BITS = frozenset({"int2", "uint2"})

TARGETS.add(
    "openvino",
    Target(
        name="openvino",
        summary="OpenVINO on CPUs",
        kernels=COMPUTE | ELEMENTWISE | MOVES,
        needs_output=frozenset({"Conv", "ConvTranspose"}),
        forms={"weights": PRODUCTS},
        refused={"uint16": "it computes wrong values with uint16 activations; int16 is right"},
        emulated={"int16": "it has no kernels for 16-bit codes and computes in float"},
        weight_formats=frozenset(n for n, f in FORMATS.items() if f.lowering == "qdq") - _TWO_BITS,
        pair_limit=PAIR_LIMIT if int8_saturates() else 0,
        source="OpenVINO 2026.4, CPU plugin: its runtime model and capability table as measured",
    ),
)
