"""Deployment targets: what each allows and turns into integer kernels, as data."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...calibrate.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a runtime wants.

    Attributes:
        name: Name on the command line.
        summary: One line for lists.
        activation_format: Format of activations unless the recipe names one.
        activation_symmetric: Whether activations are symmetric unless the recipe says otherwise.
        kernels: Operator types that have an integer kernel there; others stay in float.
        needs_output: Operator types whose integer kernel exists only with a quantizer behind it.
        fuses_relu: Whether one kernel runs product and Relu, so that a quantizer stands behind the Relu even where its
            codes do not end at 0.
        int32_bias: Operator types whose integer kernel takes an int32 bias with scale ``s_x * s_w``.
        static_attention: Whether MatMul of two activations is quantized by default.
        opset_ceiling: Highest opset that the target has kernels for.
        pair_limit: Largest sum of two neighbouring int8 weights of one sign, for kernels that add two products in 16
            bits; 0 where sums do not saturate.
        source: Where the facts come from.
    """

    name: str
    summary: str
    activation_format: str = "uint8"
    activation_symmetric: bool = False
    kernels: frozenset[str] = frozenset()
    needs_output: frozenset[str] = frozenset()
    fuses_relu: bool = False
    int32_bias: frozenset[str] = frozenset()
    static_attention: bool = False
    opset_ceiling: int = 25
    pair_limit: int = 0
    source: str = ""
    notes: tuple[str, ...] = field(default=())


TARGETS: Registry[Target] = Registry("target", __name__)
