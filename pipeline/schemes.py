"""Named schemes: a few lines of the recipe language each, where a recipe starts from.

``w`` and ``a`` stand for weights and activations, the number behind for their bits.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_BY_RULE = (
    "what no integer kernel gains on or what 8 bits ruin, each by the rule that `qpipe explain op` prints: "
    "normalizations, Softmax, smooth nonlinearities, embeddings, products of two activations (attention)"
)
_ALL_ACTIVATIONS = (
    "all activations, and every weight that is no matrix or kernel of a product: embeddings (weights.embeddings stores "
    "them too), normalizations, biases"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A scheme.

    Attributes:
        summary: What it does and when to take it.
        keys: What it sets in a `Recipe`.
        in_float: What it leaves in float, and why.
        known_as: What other tools call it.
    """

    summary: str
    keys: Mapping[str, Any]
    in_float: str = _BY_RULE
    known_as: tuple[str, ...] = ()


def _weight_only(
    summary: str, in_float: str = _ALL_ACTIVATIONS, known_as: tuple[str, ...] = (), **weights: Any
) -> Scheme:
    keys = {"weights": weights, "activations": None}
    return Scheme(summary=summary, keys=keys, in_float=in_float, known_as=known_as)


def _conversion(float_type: str, summary: str, in_float: str, known_as: tuple[str, ...]) -> Scheme:
    keys = {"weights": None, "activations": None, "float_type": float_type}
    return Scheme(summary=summary, keys=keys, in_float=in_float, known_as=known_as)


_ROWWISE = {"form": "outlier", "activations": {"format": "int8", "symmetric": True, "dynamic": True}}


SCHEMES: dict[str, Scheme] = {
    "w8a8": Scheme(
        summary="int8 weights and 8-bit activations with scales from calibration: the fastest on CPUs",
        keys={"weights": {"format": "int8"}, "activations": {}},
        known_as=("int8", "static", "ptq", "quantize_static"),
    ),
    "w8a8-dynamic": Scheme(
        summary="int8 weights, 8-bit activations with scales found at run time: needs no data",
        keys={"weights": {"format": "int8"}, "activations": {"dynamic": True}},
        in_float=f"{_BY_RULE}; Conv, whose integer kernel with run-time scales is slower than the float one",
        known_as=("dynamic", "quantize_dynamic"),
    ),
    "w8a8-vector": Scheme(
        summary="int8 with run-time scales per row of X, and scales per column of W (vector-wise): needs no data",
        keys={**_ROWWISE, "outliers": {"cap": 0, "headroom": 0.0}},
        in_float=f"{_BY_RULE}; Conv, and layers of few inputs",
        known_as=("vectorwise", "rowwise", "per-token", "w8a8-rowwise"),
    ),
    "w8a8-outlier": Scheme(
        summary="int8 rows and columns, outlier columns in floating point (LLM.int8())",
        keys=_ROWWISE,
        in_float=f"{_BY_RULE}; the columns whose inputs are outliers; small layers with outliers",
        known_as=("llm-int8", "llm.int8()", "bitsandbytes-int8"),
    ),
    "w8": _weight_only(
        "int8 weights per output channel: a quarter of the size, next to no loss",
        known_as=("eetq", "w8a16-weight-only", "weight-only-int8"),
        format="int8",
    ),
    "w4": _weight_only(
        "4-bit weights in blocks of 32: an eighth of the size, for models that wait for memory",
        known_as=("int4", "q4", "w4a16", "matmulnbits", "gptq", "awq", "hqq"),
        format="int4",
        granularity="block",
        block_size=32,
        algorithm="auto",
    ),
    "w4-nf4": _weight_only(
        "NF4 weights in blocks of 64, as bitsandbytes stores them: ONNX Runtime's MatMulBnb4",
        f"{_ALL_ACTIVATIONS}; products that MatMulBnb4 does not compute (Conv, inputs that 64 does not divide)",
        known_as=("nf4", "qlora", "bnb4", "bitsandbytes-4bit"),
        format="nf4",
        granularity="block",
        block_size=64,
    ),
    "w8-global": _weight_only(
        "int8 weights with one scale for the whole model: a baseline, to see what scales per channel gain",
        known_as=("global", "per-model"),
        format="int8",
        granularity="model",
    ),
    "w8a16": Scheme(
        summary="int8 weights, int16 activations: accuracy of float where a runtime has 16-bit kernels (NPUs)",
        keys={"weights": {"format": "int8"}, "activations": {"format": "int16", "symmetric": True}},
    ),
    "w16a16": Scheme(
        summary="int16 weights and activations: a measure of what 16 bits lose",
        keys={"weights": {"format": "int16"}, "activations": {"format": "int16", "symmetric": True}},
    ),
    "fp8": Scheme(
        summary="float8 e4m3 weights and activations, for GPUs from Ada and Hopper on (TensorRT)",
        keys={
            "weights": {"format": "float8_e4m3fn"},
            "activations": {"format": "float8_e4m3fn", "symmetric": True},
        },
        known_as=("float8", "e4m3", "w8a8-fp8"),
    ),
    "fp16": _conversion(
        "float16",
        "float16 throughout: half the size; inputs and outputs keep their types",
        "tensors whose calibrated range exceeds 65504 and the operators at them; operators without float16",
        ("float16", "half"),
    ),
    "bf16": _conversion(
        "bfloat16",
        "bfloat16 throughout: half the size with the range of float32; inputs and outputs keep their types",
        "operators without bfloat16",
        ("bfloat16",),
    ),
    "float": Scheme(
        summary="nothing is quantized: for layers that are to be left alone",
        keys={"weights": None, "activations": None},
        in_float="everything",
        known_as=("none", "fp32", "float32"),
    ),
}
"""Every named scheme. The options of `Recipe` that a scheme does not set keep their defaults."""


def near_schemes(name: str) -> list[str]:
    """Return the schemes that a wrong name may mean: by what other tools call them, then by spelling."""
    asked = name.lower().replace("_", "-")
    names = {known: scheme for scheme, found in SCHEMES.items() for known in (scheme, *found.known_as)}
    near = [asked] if asked in names else difflib.get_close_matches(asked, names, n=3, cutoff=0.5)
    return list(dict.fromkeys(names[known] for known in near)) or list(SCHEMES)
