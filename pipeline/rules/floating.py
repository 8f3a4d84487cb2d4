"""Operators that stay in float, each with the reason that the plan prints."""

from __future__ import annotations

from . import OpRule, add

_NORMALIZATION = "normalization divides by a small statistic; codes of 8 bits ruin it and no kernel gains"
_PROBABILITY = "its values span many orders of magnitude below 1; 8 bits would zero the small ones"
_SMOOTH = "smooth nonlinearity between quantized layers; no integer kernel gains"
_REDUCTION = "sums need more bits than the codes have"
_MASK = "mask and selection arithmetic, whose sentinels must never enter a range"

_REASONS = {
    **dict.fromkeys(
        (
            "LayerNormalization",
            "BatchNormalization",
            "InstanceNormalization",
            "GroupNormalization",
            "RMSNormalization",
            "SimplifiedLayerNormalization",
            "SkipLayerNormalization",
            "LpNormalization",
        ),
        _NORMALIZATION,
    ),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Exp", "Log"), _PROBABILITY),
    **dict.fromkeys(("Gelu", "Erf", "Tanh", "Elu", "HardSwish", "HardSigmoid", "Mish", "Softplus", "Swish"), _SMOOTH),
    **dict.fromkeys(
        ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceProd", "CumSum"), _REDUCTION
    ),
    **dict.fromkeys(("Where", "Greater", "Less", "Equal", "And", "Or", "Not", "GreaterOrEqual", "Trilu"), _MASK),
    **dict.fromkeys(("Div", "Pow", "Sqrt", "Reciprocal", "Neg", "Abs", "Min", "Max"), "no integer kernel gains"),
}

for _op, _reason in _REASONS.items():
    add(OpRule(op=_op, kind="float", reason=_reason))
