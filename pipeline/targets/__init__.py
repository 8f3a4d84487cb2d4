"""Deployment targets: what each allows and turns into integer kernels, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...calibrate.formats import FORMATS
from ...calibrate.registry import Registry

MATRIX_PRODUCTS = frozenset({"MatMul", "Gemm"})
PRODUCTS = MATRIX_PRODUCTS | {"Conv", "ConvTranspose"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a runtime wants.

    Attributes:
        name: Name on the command line.
        summary: One line for lists.
        activation_format: Format of activations unless the recipe names one.
        activation_symmetric: Whether activations are symmetric unless the recipe says otherwise.
        asymmetric: Whether zero points other than 0 run.
        kernels: Operator types that have an integer kernel there; others stay in float.
        needs_output: Operator types whose integer kernel exists only with a quantizer behind it.
        fuses_relu: Whether one kernel runs product and Relu, so that a quantizer stands behind the Relu even where its
            codes do not end at 0.
        int32_bias: Operator types whose integer kernel takes an int32 bias with scale ``s_x * s_w``.
        static_attention: Whether MatMul of two activations is quantized by default.
        forms: Operator types that run in each form other than static Q/DQ: ``weights`` (a DequantizeLinear behind
            stored codes, activations float), ``dynamic``, ``recurrent``, ``nbits``, ``bnb4``, ``outlier``.
        refused: Format of activations -> why it does not run there; weights in it do.
        emulated: Format of activations -> what really happens to it there.
        weight_formats: Formats of weights that run; empty for all.
        scale_formats: Formats of 8 bits that scales of blocks may have in the file; others are written as float32.
        accuracy_level: What MatMulNBits computes with unless the recipe says so: 4 rounds activations to int8.
        float_zero_bits: Bits of the codes of which MatMulNBits takes zero points that are real numbers.
        float_types: Types that the float remainder may have.
        half_scales: Whether Q/DQ with float16 or bfloat16 scales become integer kernels; if not, operators between them
            stay in float32.
        float32_ops: Operator types that stay in float32 when the remainder is converted.
        opset_ceiling: Highest opset that the target has kernels for.
        pair_limit: Largest sum of two neighbouring int8 weights of one sign, for kernels that add two products in 16
            bits; 0 where sums do not saturate.
        fuses_blocks: Whether products of 8-bit codes are right where scales of the weight are in blocks.
        passes: Names of the passes (`TARGET_PASSES`) that rewrite what the plan left in float, for speed.
        evidence: Who is asked what became of a model: a key of `fusion.engines.ENGINES`.
        source: Where the facts come from.
        notes: What a user should know beside.
    """

    name: str
    summary: str
    activation_format: str = "uint8"
    activation_symmetric: bool = False
    asymmetric: bool = True
    kernels: frozenset[str] = frozenset()
    needs_output: frozenset[str] = frozenset()
    fuses_relu: bool = False
    int32_bias: frozenset[str] = frozenset()
    static_attention: bool = False
    forms: Mapping[str, frozenset[str]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    emulated: Mapping[str, str] = field(default_factory=dict)
    weight_formats: frozenset[str] = frozenset()
    scale_formats: frozenset[str] = frozenset()
    accuracy_level: int = 0
    float_zero_bits: frozenset[int] = frozenset()
    float_types: frozenset[str] = frozenset({"float32", "float16", "bfloat16"})
    half_scales: bool = True
    float32_ops: frozenset[str] = frozenset()
    opset_ceiling: int = 25
    pair_limit: int = 0
    fuses_blocks: bool = True
    passes: frozenset[str] = frozenset()
    evidence: str = "ort"
    source: str = ""
    notes: tuple[str, ...] = ()


TARGETS: Registry[Target] = Registry("target", __name__)


def qdq_formats(latest_opset: int, *without: str) -> frozenset[str]:
    """Return the formats that Q/DQ operators take up to an opset, less those named ``without``."""
    names = (name for name, fmt in FORMATS.items() if fmt.lowering == "qdq" and fmt.min_opset <= latest_opset)
    return frozenset(names) - set(without)
