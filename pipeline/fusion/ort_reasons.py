"""Why ONNX Runtime's CPU provider leaves a node in float between Q/DQ: the conditions of its optimizer, one by one.

Source: ONNX Runtime 1.31, core/optimizer/qdq_transformer (node group selectors), tried on the conformance models.
"""

from __future__ import annotations

from collections.abc import Callable

from .structure import BYTES, PRODUCTS, Candidate

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


def _float_input(candidate: Candidate) -> str:
    slots = range(2) if candidate.node.op in PRODUCTS | {"Add", "Mul"} else range(1)
    for slot in slots:
        if slot < len(candidate.node.inputs) and slot not in candidate.reads:
            return f"its input {candidate.node.inputs[slot].name!r} is float"
    return ""


def _no_quantizer(candidate: Candidate) -> str:
    if candidate.node.op not in NEEDS_OUTPUT:
        return ""
    output = candidate.node.outputs[0].name
    if candidate.gives is None:
        return f"its integer kernel gives codes, and no QuantizeLinear stands behind its output {output!r}"
    return f"its output {output!r} has other readers than the quantizer behind it" if candidate.shared else ""


def _gemm(candidate: Candidate) -> str:
    node = candidate.node
    if node.op != "Gemm":
        return ""
    weight = candidate.reads.get(_WEIGHT)
    if weight is not None and not weight.has_zero:
        return f"its weight {weight.tensor!r} has no zero point, and the kernel asks for one, 0 or not"
    has_bias = len(node.inputs) > _BIAS and not node.inputs[_BIAS].is_empty()
    if has_bias and _BIAS not in candidate.reads:
        return f"its bias {node.inputs[_BIAS].name!r} is float; the kernel takes int32 with scale s_x * s_w"
    return ""


_CONDITIONS: tuple[Callable[[Candidate], str], ...] = (
    _no_kernel,
    _wide,
    _half,
    _float_input,
    _no_quantizer,
    _gemm,
)


def why_island(candidate: Candidate) -> str:
    """Return the first condition that a node between Q/DQ does not meet."""
    found = next((reason for condition in _CONDITIONS if (reason := condition(candidate))), "")
    return found or "ONNX Runtime left it in float, and no condition known here says why"


def why_wrong(candidate: Candidate) -> str:
    """Return what makes a kernel compute wrong values: it is chosen whatever the scales of the weight are."""
    port, allowed = candidate.reads.get(_WEIGHT), _WEIGHT_AXES.get(candidate.node.op)
    if port is None or allowed is None or not port.stored:
        return ""
    if port.block_size:
        return f"WRONG VALUES: the scales of {port.tensor!r} are in blocks, which this kernel does not know"
    if port.axis is not None and port.axis not in allowed:
        return f"WRONG VALUES: the scales of {port.tensor!r} are along axis {port.axis}, not along its outputs"
    return ""
