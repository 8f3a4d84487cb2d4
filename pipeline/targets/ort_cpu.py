"""ONNX Runtime's CPU provider.

Its optimizer turns DQ, DQ -> MatMul into MatMulIntegerToFloat, which keeps a float output, so no quantizer stands
behind a MatMul; Conv becomes QLinearConv only with a quantizer behind it and an int32 bias. ConvTranspose has no
integer kernel there.
"""

from __future__ import annotations

from ...calibrate.weights.pairs import PAIR_LIMIT
from ..cpu import int8_saturates
from . import TARGETS, Target
from .portable import COMPUTE, ELEMENTWISE, MOVES

_KERNELS = (COMPUTE - {"ConvTranspose"}) | ELEMENTWISE | MOVES | {"LeakyRelu", "Sigmoid"}


def _add(name: str, summary: str, pair_limit: int) -> None:
    TARGETS.add(
        name,
        Target(
            name=name,
            summary=summary,
            kernels=_KERNELS,
            needs_output=frozenset({"Conv"}),
            int32_bias=frozenset({"Conv", "Gemm"}),
            pair_limit=pair_limit,
            source="ONNX Runtime 1.31, QDQ selectors of the CPU provider",
        ),
    )


_add("ort-cpu", "ONNX Runtime on CPUs like this one", PAIR_LIMIT if int8_saturates() else 0)
_add("ort-cpu-avx2", "ONNX Runtime on x86 CPUs without VNNI: weights keep its int8 kernels from saturating", PAIR_LIMIT)
_add("ort-cpu-vnni", "ONNX Runtime on CPUs whose int8 kernels are exact (x86 with VNNI, Arm)", 0)
