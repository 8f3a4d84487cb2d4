"""Why ONNX Runtime's CPU provider leaves a node in float between Q/DQ: the conditions of its optimizer, one by one.

Source: ONNX Runtime 1.31, core/optimizer/qdq_transformer (node group selectors), tried on the conformance models.
"""

from __future__ import annotations

from collections.abc import Callable

from .structure import BYTES, PRODUCTS, Candidate, Port

NEEDS_OUTPUT = frozenset(
    {"Conv", "Add", "Mul", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Softmax", "Concat", "Where"}
)
"""Operators whose integer kernel gives codes, so that a quantizer has to stand behind them."""
KERNELS = NEEDS_OUTPUT | {"MatMul", "Gemm"}
_WEIGHT_AXES = {"Conv": (0,), "MatMul": (1, -1), "Gemm": (0, 1)}
_WEIGHT, _BIAS = 1, 2


def _no_kernel(candidate: Candidate) -> str:
    op = candidate.node.op
    return "" if op in KERNELS else f"ONNX Runtime's CPU provider has no integer kernel for {op}"


def _wide(candidate: Candidate) -> str:
    other = [p for i, p in candidate.reads.items() if p.codes not in BYTES and i != _BIAS]
    if not other:
        return ""
    return f"its input {other[0].tensor!r} has {other[0].codes} codes, and the kernels there take 8 bits"


def _half(candidate: Candidate) -> str:
    other = [p for p in candidate.reads.values() if p.scales != "float32"]
    return f"the scale of {other[0].tensor!r} is {other[0].scales}; only float32 scales are fused" if other else ""


def _blocks(candidate: Candidate) -> str:
    other = [p for p in candidate.reads.values() if p.block_size]
    return f"{other[0].tensor!r} has scales in blocks, which no integer kernel takes" if other else ""


def _float_input(candidate: Candidate) -> str:
    slots = range(2) if candidate.node.op in PRODUCTS | {"Add", "Mul"} else range(1)
    for slot in slots:
        if slot < len(candidate.node.inputs) and slot not in candidate.reads:
            return f"its input {candidate.node.inputs[slot].name!r} is float"
    return ""


def _axis(candidate: Candidate) -> str:
    port, allowed = candidate.reads.get(_WEIGHT), _WEIGHT_AXES.get(candidate.node.op)
    if port is None or port.axis is None or allowed is None or port.axis in allowed:
        return ""
    return f"the scales of its weight {port.tensor!r} are along axis {port.axis}, the kernel takes axis {allowed[0]}"


def _no_quantizer(candidate: Candidate) -> str:
    if candidate.node.op not in NEEDS_OUTPUT:
        return ""
    output = candidate.node.outputs[0].name
    if candidate.gives is None:
        return f"its integer kernel gives codes, and no QuantizeLinear stands behind its output {output!r}"
    return f"its output {output!r} has other readers than the quantizer behind it" if candidate.shared else ""


def _kinds(candidate: Candidate) -> str:
    ports: list[Port] = [candidate.reads[0]] if 0 in candidate.reads else []
    if candidate.gives is None or not ports or candidate.gives.codes == ports[0].codes:
        return ""
    return f"it reads {ports[0].codes} and gives {candidate.gives.codes} codes; its kernel keeps one type"


def _bias(candidate: Candidate) -> str:
    node = candidate.node
    has_bias = node.op in ("Gemm", "Conv") and len(node.inputs) > _BIAS and not node.inputs[_BIAS].is_empty()
    if not has_bias:
        return ""
    if _BIAS not in candidate.reads:
        return f"its bias {node.inputs[_BIAS].name!r} is float; the kernel takes int32 with scale s_x * s_w"
    return ""


_CONDITIONS: tuple[Callable[[Candidate], str], ...] = (
    _no_kernel,
    _wide,
    _half,
    _blocks,
    _float_input,
    _axis,
    _no_quantizer,
    _kinds,
    _bias,
)


def why_island(candidate: Candidate) -> str:
    """Return the first condition that a node between Q/DQ does not meet."""
    found = next((reason for condition in _CONDITIONS if (reason := condition(candidate))), "")
    return found or "ONNX Runtime left it in float, and no condition known here says why"
