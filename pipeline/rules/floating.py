"""Operators that stay in float, each with the reason that the plan prints."""

from __future__ import annotations

from . import MICROSOFT, add_each

_NORMALIZATION = "normalization divides by a small statistic; codes of 8 bits ruin it and no kernel gains"
_PROBABILITY = "its values span many orders of magnitude below 1; 8 bits would zero the small ones"
_SMOOTH = "smooth nonlinearity between quantized layers; no integer kernel gains"
_REDUCTION = "sums need more bits than the codes have"
_MASK = "mask and selection arithmetic, whose sentinels must never enter a range"
_ATTENTION = "products of activations (attention): float keeps their accuracy"
_CONTROL = "runs its bodies; the nodes inside are decided one by one"
_PLACES = "gives places or sizes, not values"

add_each(
    (
        "LayerNormalization",
        "BatchNormalization",
        "InstanceNormalization",
        "GroupNormalization",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "MeanVarianceNormalization",
        "LpNormalization",
        "LRN",
    ),
    "float",
    _NORMALIZATION,
)
add_each(("Softmax", "LogSoftmax", "Exp", "Log"), "float", _PROBABILITY)
add_each(
    (
        "Celu",
        "Elu",
        "Erf",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Mish",
        "PRelu",
        "Selu",
        "Softplus",
        "Softsign",
        "Swish",
        "Tanh",
    ),
    "float",
    _SMOOTH,
)
add_each(
    ("CumSum", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
    "float",
    _REDUCTION,
)
add_each(
    ("And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not", "Or", "Trilu", "Xor"),
    "float",
    _MASK,
)
add_each(
    ("Abs", "Ceil", "Cos", "Floor", "Max", "Min", "Mod", "Neg", "Pow", "Reciprocal", "Round", "Sign", "Sin", "Sqrt"),
    "float",
    "no integer kernel gains",
)
add_each(("Attention", "RotaryEmbedding"), "float", _ATTENTION)
add_each(("If", "Loop", "Scan"), "float", _CONTROL)
add_each(("ArgMax", "ArgMin", "NonMaxSuppression", "NonZero", "OneHot", "Range", "Shape", "Size"), "float", _PLACES)
add_each(("Cast", "CastLike", "Constant", "ConstantOfShape"), "float", "makes or converts values, does not compute")
add_each(("Einsum",), "float", "only an Einsum that is a product with a matrix is rewritten to MatMul and quantized")
add_each(("ScatterElements", "ScatterND"), "float", "overwrites parts of a tensor; no integer kernel gains")

add_each(
    ("Attention",),
    "float",
    "only one with a constant weight, a bias, no past, and no mask or one of 2 or 3 axes is taken apart into a MatMul, "
    "which is quantized, and MultiHeadAttention",
    domain=MICROSOFT,
)
add_each(
    ("MultiHeadAttention", "GroupQueryAttention", "PackedMultiHeadAttention", "RotaryEmbedding"),
    "float",
    _ATTENTION,
    domain=MICROSOFT,
)
add_each(
    ("GroupNorm", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
    "float",
    _NORMALIZATION,
    domain=MICROSOFT,
)
add_each(("BiasGelu", "FastGelu", "Gelu", "QuickGelu"), "float", _SMOOTH, domain=MICROSOFT)
add_each(
    ("EmbedLayerNormalization",),
    "float",
    "holds tables of embeddings and normalizes what it finds; a model exported without it can have them as codes "
    "(weights.embeddings=true)",
    domain=MICROSOFT,
)
add_each(
    ("PackedAttention", "LongformerAttention", "DecoderMaskedSelfAttention", "DecoderAttention"),
    "float",
    "holds weights inside a fused attention; a model exported without it can have them as codes",
    domain=MICROSOFT,
)
