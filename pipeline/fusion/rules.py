"""What is documented of runtimes that cannot be asked here. Everything that comes of it is marked as a rule.

Source: NVIDIA TensorRT 11, Working with Quantized Types (explicit quantization, Q/DQ placement, weight formats);
ONNX Runtime, CUDA execution provider (QDQ operators, MatMulNBits, MatMulBnb4).
"""

from __future__ import annotations

from collections.abc import Callable

from ..graph import Model
from . import Evidence, Fate, Verdict
from .structure import PACKED, PRODUCTS, Candidate, Port, candidates, describe_codes, pairs

Rule = Callable[[Candidate], tuple[Verdict, str, str]]
"""Candidate -> verdict, what it becomes, and the reason of an island."""

_TENSORRT_CODES = ("int8", "float8e4m3fn", "float8_e4m3fn")
_OUT_AXES = {"Conv": (0,), "ConvTranspose": (1,), "MatMul": (1, -1), "Gemm": (0, 1)}


def evidence(model: Model, runtime: str) -> Evidence:
    """Say what becomes of a model's pairs and products by the documented rules of ``runtime``, a key of `RULES`."""
    source, rule = RULES[runtime]
    found = []
    for candidate in candidates(model.graph):
        verdict, became, reason = rule(candidate)
        found.append(
            Fate(
                node=candidate.node.name,
                op=candidate.node.op,
                verdict=verdict,
                codes=describe_codes(candidate),
                became=became,
                reason=reason,
            )
        )
    return Evidence(source=source, measured=False, fates=tuple(found), pairs=len(pairs(model.graph)))


def _tensorrt(candidate: Candidate) -> tuple[Verdict, str, str]:
    node = candidate.node
    if not candidate.on_codes:
        return "float", "", "it reads no codes of activations in the file"
    if node.domain:
        return "island", "", f"TensorRT does not know the operator {node.domain}::{node.op}"
    if node.op not in PRODUCTS:
        return "codes", "", ""
    bad = next((why for port in candidate.reads.values() if (why := _refused_by_tensorrt(port))), "")
    missing = [t.name for i, t in enumerate(node.inputs[:2]) if i not in candidate.reads]
    weight = candidate.reads.get(1)
    if not bad and missing:
        bad = f"its input {missing[0]!r} is float: both inputs of a product have to come from DequantizeLinear"
    if not bad and weight is not None and weight.axis is not None and weight.axis not in _OUT_AXES[node.op]:
        bad = f"the scales of {weight.tensor!r} are along axis {weight.axis}, not along the output channels"
    if not bad and 2 in candidate.reads:
        bad = "its bias is stored as int32 codes; TensorRT takes a float bias"
    return ("island", "", bad) if bad else ("integer", f"{node.op} on {candidate.reads[0].codes}", "")


def _refused_by_tensorrt(port: Port) -> str:
    if port.codes in ("int32",):
        return ""
    if port.codes not in _TENSORRT_CODES:
        return f"{port.tensor!r} has {port.codes} codes; TensorRT computes on int8 and float8 (e4m3)"
    return "" if port.centred else f"{port.tensor!r} has a zero point other than 0, which TensorRT refuses"


def _cuda(candidate: Candidate) -> tuple[Verdict, str, str]:
    if candidate.node.op in PACKED:
        return "packed", candidate.node.op, ""
    if candidate.node.op == "OutlierMatMul":
        return "integer", "OutlierMatMul (plugin)", ""
    if candidate.on_codes:
        return "island", candidate.node.op, "the CUDA provider has no integer kernels: Q/DQ run as they stand"
    return "float", candidate.node.op, "it reads no codes of activations in the file"


RULES: dict[str, tuple[str, Rule]] = {
    "tensorrt": ("rules of NVIDIA TensorRT 11's documentation; TensorRT was not asked", _tensorrt),
    "ort-cuda": ("rules of ONNX Runtime's CUDA provider as documented; it was not asked", _cuda),
}
