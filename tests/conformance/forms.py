"""One-operator models in every combination of weight format, activation format, granularity and operator.

A weight passes a DequantizeLinear (two for formats of two scale levels), an activation a Q/DQ pair on its way in and
another on its way out, which is what runtimes fuse into integer kernels. Beside them the forms that are no Q/DQ:
float16 and bfloat16 operators, dynamic integer products, and ONNX Runtime's own products of packed weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from qpipe.calibrate.formats import FORMATS, Format
from qpipe.calibrate.formats.codebook import BNB4_QUANT_TYPE, pack_bnb4
from qpipe.calibrate.granularity import PER_TENSOR, Granularity, per_block, per_channel
from qpipe.calibrate.qarray import QArray, QParams, Range, Spec, minmax_range, params_from_range, quantize

Array = np.ndarray[Any, Any]

BLOCK = 32
FLOOR_OPSET = 19
"""Models are built at this opset at least: the reference evaluator's DequantizeLinear begins there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """How an operator holds its weight.

    Attributes:
        name: Name in tables.
        op_type: ONNX operator.
        weight_shape: Shape of the weight.
        input_shape: Shape of the other input.
        output_axis: Axis of the weight that one output channel has for itself.
        input_axis: Axis of the weight that is summed over: the one that is cut into blocks.
        attributes: Attributes of the node.
    """

    name: str
    op_type: str
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_axis: int
    input_axis: int
    attributes: tuple[tuple[str, Any], ...] = ()


_PADDED = ("pads", [1, 1, 1, 1])
OPERATORS = {
    operator.name: operator
    for operator in (
        Operator(
            name="MatMul", op_type="MatMul", weight_shape=(64, 48), input_shape=(5, 64), output_axis=1, input_axis=0
        ),
        Operator(
            name="Gemm",
            op_type="Gemm",
            weight_shape=(48, 64),
            input_shape=(5, 64),
            output_axis=0,
            input_axis=1,
            attributes=(("transB", 1),),
        ),
        Operator(
            name="Conv",
            op_type="Conv",
            weight_shape=(12, 64, 3, 3),
            input_shape=(1, 64, 4, 4),
            output_axis=0,
            input_axis=1,
            attributes=(_PADDED,),
        ),
        Operator(
            name="ConvTranspose",
            op_type="ConvTranspose",
            weight_shape=(64, 12, 3, 3),
            input_shape=(1, 64, 4, 4),
            output_axis=1,
            input_axis=0,
            attributes=(_PADDED,),
        ),
        Operator(
            name="ConvTranspose g2",
            op_type="ConvTranspose",
            weight_shape=(64, 6, 3, 3),
            input_shape=(1, 64, 4, 4),
            output_axis=1,
            input_axis=0,
            attributes=(_PADDED, ("group", 2)),
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One row of the capability table, for one operator.

    Attributes:
        weight: Format of the weight.
        activation: Format of the input and the output, None for float32.
        granularity: ``"tensor"``, ``"channel"`` or ``"block"`` of the weight.
        operator: Name in `OPERATORS`.
        carrier: ``"qdq"``, ``"cast"``, ``"dynamic"``, or the operator of packed weights.
        variant: ``"float32 scales"`` of a microscaling format, ``"float32 output"`` (no Q/DQ behind the operator) or
            ``"7-bit weights"``, or ``"float zero points"`` of packed weights; empty for the plain form.
    """

    weight: str
    activation: str | None
    granularity: str
    operator: str
    carrier: str = "qdq"
    variant: str = ""

    @property
    def row(self) -> tuple[str, str | None, str, str, str]:
        """What the forms of one row of the table share."""
        return self.weight, self.activation, self.granularity, self.carrier, self.variant

    @property
    def opset(self) -> int:
        """The first opset that can carry the form."""
        weight = FORMAT_OF_ELEMENT[self.weight] if self.variant == "float32 scales" else FORMATS.get(self.weight)
        by_granularity = {"channel": 13, "block": 21}.get(self.granularity, 10) if self.carrier == "qdq" else 10
        by_activation = FORMATS.get(self.activation).min_opset if self.activation else 10
        by_operator = 22 if self.weight == "bfloat16" and "Conv" in self.operator else 10
        by_carrier = 11 if self.carrier == "dynamic" else 10
        return max(weight.min_opset, by_activation, by_granularity, by_operator, by_carrier)


FORMAT_OF_ELEMENT = {
    name: next(f for _, f in FORMATS.items() if not f.block_size and f.lowering == "qdq" and f.dtype == fmt.dtype)
    for name, fmt in FORMATS.items()
    if fmt.block_size
}
"""The plain format of the elements of a block format: mxfp4 -> float4_e2m1."""

PAIRS = (
    ("int8", "uint8"),
    ("int8", "int8"),
    ("uint8", "uint8"),
    ("int8", "uint16"),
    ("int8", "int16"),
    ("int16", "int16"),
    ("float8_e4m3fn", "float8_e4m3fn"),
    ("float8_e5m2", "float8_e5m2"),
)
"""Formats of (weight, activation)."""


def all_forms() -> Iterator[Form]:
    """Yield every form, row by row; formats above opset 25 are left out, for no runtime here goes that far."""
    for form in (*_weight_only(), *_weight_and_activation()):
        for operator in OPERATORS:
            yield Form(operator=operator, **form)
    for weight in ("float16", "bfloat16"):
        for operator in OPERATORS:
            yield Form(weight=weight, activation=weight, granularity="tensor", operator=operator, carrier="cast")
    for granularity, variant in (("tensor", ""), ("channel", ""), ("channel", "7-bit weights")):
        yield Form(
            weight="int8",
            activation="uint8",
            granularity=granularity,
            operator="MatMul",
            carrier="dynamic",
            variant=variant,
        )
    for weight in BNB4_QUANT_TYPE:
        yield Form(weight=weight, activation=None, granularity="block", operator="MatMul", carrier="MatMulBnb4")
    for weight in ("uint2", "uint4", "uint8"):
        shared = {"weight": weight, "activation": None, "granularity": "block", "operator": "MatMul"}
        for variant in ("", "float zero points") if weight != "uint8" else ("",):
            yield Form(carrier="MatMulNBits", variant=variant, **shared)


def _weight_only() -> Iterator[dict[str, Any]]:
    formats = [fmt for _, fmt in FORMATS.items() if fmt.lowering == "qdq" and fmt.min_opset <= 25]
    for fmt in sorted(formats, key=lambda f: (not f.is_integer, f.block_size, f.bits == 16, -f.bits, f.name)):
        for granularity in ("block",) if fmt.block_size else ("tensor", "channel", "block"):
            yield {"weight": fmt.name, "activation": None, "granularity": granularity}
        if fmt.scale_format == "float8_e8m0":
            yield {"weight": fmt.name, "activation": None, "granularity": "block", "variant": "float32 scales"}


def _weight_and_activation() -> Iterator[dict[str, Any]]:
    for weight, activation in PAIRS:
        for granularity in ("tensor", "channel"):
            yield {"weight": weight, "activation": activation, "granularity": granularity}
        yield {"weight": weight, "activation": activation, "granularity": "channel", "variant": "float32 output"}
        if weight == "int8" and activation in ("uint8", "int8"):
            yield {"weight": weight, "activation": activation, "granularity": "channel", "variant": "7-bit weights"}


class _Builder:
    """Nodes and initializers of one model."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.operator = OPERATORS[form.operator]
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        seed = sum(map(ord, f"{form.row}{form.operator}"))
        rng = np.random.default_rng(seed)
        self.x = rng.standard_normal(self.operator.input_shape).astype(np.float32)
        self.w = (rng.standard_normal(self.operator.weight_shape) / 8).astype(np.float32)

    def constant(self, name: str, array: Array) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def params(self, name: str, params: QParams) -> list[str]:
        """Scale and zero point as ONNX wants them: [] per tensor, [d] per channel, the array's rank per block."""
        granularity = params.spec.granularity
        shape = (-1,) if granularity.axis is not None and not granularity.block_size else params.scale.shape
        names = [self.constant(f"{name}_scale", params.scale.reshape(shape))]
        if params.zero_point is not None:
            names.append(self.constant(f"{name}_zero_point", params.zero_point.reshape(shape)))
        return names

    def weight(self) -> str:
        """The weight behind its DequantizeLinear."""
        qarray = quantize_weight(self.w, self.operator, self.form)
        params, granularity = qarray.params, qarray.params.spec.granularity
        options: dict[str, Any] = {} if granularity.axis is None else {"axis": granularity.axis}
        if granularity.block_size:
            options["block_size"] = granularity.block_size
        names = self.params("w", params) if self.stores_float32(params) else [self.stored_scale(params, options)]
        return self.node("DequantizeLinear", [self.constant("w_codes", qarray.q), *names], "w", **options)

    def stores_float32(self, params: QParams) -> bool:
        return params.scale_codes is None or self.form.variant == "float32 scales"

    def stored_scale(self, params: QParams, options: dict[str, Any]) -> str:
        """The scales as codes: read directly, or through a DequantizeLinear of their own."""
        assert params.scale_codes is not None
        codes = self.constant("w_scale_codes", params.scale_codes.q)
        if params.spec.format.scale_levels == 1:
            options["output_dtype"] = TensorProto.FLOAT
            return codes
        outer = self.constant("w_tensor_scale", params.scale_codes.params.scale)
        return self.node("DequantizeLinear", [codes, outer], "w_scale")

    def quantized(self, value: str, name: str, params: QParams) -> str:
        """``value`` behind a Q/DQ pair."""
        names = self.params(name, params)
        if params.zero_point is None:  # its type is what says which type to quantize to
            names.append(self.constant(f"{name}_zero_point", params.spec.format.zeros(())))
        codes = self.node("QuantizeLinear", [value, *names], f"{name}_codes")
        return self.node("DequantizeLinear", [codes, *names], f"{name}_real")


def quantize_weight(w: Array, operator: Operator, form: Form) -> QArray:
    """Quantize a weight in its own layout, as the form says."""
    fmt: Format = FORMATS.get(form.weight)
    granularities: dict[str, Granularity] = {
        "tensor": PER_TENSOR,
        "channel": per_channel(operator.output_axis),
        "block": per_block(operator.input_axis, fmt.block_size or BLOCK),
    }
    spec = Spec(
        format=fmt,
        granularity=granularities[form.granularity],
        symmetric=fmt.kind != "uint",
        reduce_bits=1 if form.variant == "7-bit weights" else 0,
        float_zero=form.variant == "float zero points",
    )
    return quantize(w, params_from_range(minmax_range(w, spec.granularity), spec))


def build(form: Form) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Return the model of a form, with input ``x`` and output ``y`` in float32, and its feeds."""
    builder = _Builder(form)
    {"cast": _cast, "dynamic": _dynamic, "MatMulBnb4": _bnb4, "MatMulNBits": _nbits}.get(form.carrier, _qdq)(builder)
    imports = [helper.make_opsetid("", max(form.opset, FLOOR_OPSET))]
    if form.carrier.startswith("MatMul"):
        imports.append(helper.make_opsetid("com.microsoft", 1))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, builder.x.shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, output_shape(builder.operator))
    graph = helper.make_graph(builder.nodes, "one_operator", [x], [y], builder.initializers)
    ir_version = helper.find_min_ir_version_for(imports, ignore_unknown=True)
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version), {"x": builder.x}


def output_shape(operator: Operator) -> list[int]:
    """Return the shape of the output; images keep their size, for they are padded."""
    channels = operator.weight_shape[operator.output_axis] * dict(operator.attributes).get("group", 1)
    if operator.op_type in ("MatMul", "Gemm"):
        return [operator.input_shape[0], channels]
    return [operator.input_shape[0], channels, *operator.input_shape[2:]]


def activation_params(form: Form, rng: Range) -> QParams:
    """Return per-tensor parameters of the activation's format for a range."""
    fmt = FORMATS.get(str(form.activation))
    return params_from_range(rng, Spec(format=fmt, symmetric=fmt.kind != "uint"))


def output_params(form: Form) -> QParams | None:
    """Return the parameters of the Q/DQ pair behind the operator, None without one.

    Outputs are sums of products of N(0, 1) and N(0, 1/64); the range is four standard deviations.
    """
    if form.carrier != "qdq" or not form.activation or form.variant == "float32 output":
        return None
    operator = OPERATORS[form.operator]
    fan_in = operator.weight_shape[operator.input_axis] // dict(operator.attributes).get("group", 1)
    reach = 4 * float(np.sqrt(fan_in * np.prod(operator.weight_shape[2:]))) / 8
    return activation_params(form, Range.of(-reach, reach))


def _qdq(builder: _Builder) -> None:
    operator, form, output = builder.operator, builder.form, output_params(builder.form)
    x = "x"
    if form.activation:
        x = builder.quantized("x", "x", activation_params(form, minmax_range(builder.x, PER_TENSOR)))
    name = "y" if output is None else "y_float"
    y = builder.node(operator.op_type, [x, builder.weight()], name, **dict(operator.attributes))
    if output is not None:
        builder.quantized(y, "y", output)
        builder.nodes[-1].output[0] = "y"


def _cast(builder: _Builder) -> None:
    fmt = FORMATS.get(builder.form.weight)
    elem_type = getattr(TensorProto, fmt.onnx_type)
    x = builder.node("Cast", ["x"], "x_low", to=elem_type)
    w = builder.constant("w_low", builder.w.astype(fmt.dtype))
    builder.node(builder.operator.op_type, [x, w], "y_low", **dict(builder.operator.attributes))
    builder.node("Cast", ["y_low"], "y", to=TensorProto.FLOAT)


def _dynamic(builder: _Builder) -> None:
    """DynamicQuantizeLinear, MatMulInteger, Cast, Mul: the form that ONNX Runtime fuses."""
    qarray = quantize_weight(builder.w, builder.operator, builder.form)
    outputs = ["x_codes", "x_scale", "x_zero_point"]
    builder.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], outputs))
    w = builder.constant("w_codes", qarray.q)
    scale = builder.constant("w_scale", qarray.params.scale.ravel())
    zero = builder.constant("w_zero_point", np.zeros((), np.int8))
    sums = builder.node("MatMulInteger", ["x_codes", w, "x_zero_point", zero], "sums")
    real = builder.node("Cast", [sums], "sums_float", to=TensorProto.FLOAT)
    both = builder.node("Mul", ["x_scale", scale], "scale")
    builder.node("Mul", [real, both], "y")


def _bnb4(builder: _Builder) -> None:
    """``x [m, k] @ w [k, n]`` with ``w`` stored as [n, k] codes."""
    form = builder.form
    transposed = Operator(
        name="", op_type="", weight_shape=builder.w.T.shape, input_shape=(), output_axis=0, input_axis=1
    )
    qarray = quantize_weight(builder.w.T, transposed, form)
    packed = builder.constant("w_packed", pack_bnb4(qarray.q))
    amax = builder.constant("w_amax", qarray.params.scale.ravel())
    n, k = qarray.q.shape
    attributes = {"K": k, "N": n, "block_size": BLOCK, "quant_type": BNB4_QUANT_TYPE[form.weight]}
    builder.node("MatMulBnb4", ["x", packed, amax], "y", domain="com.microsoft", **attributes)


def _nbits(builder: _Builder) -> None:
    """``x [m, k] @ w [k, n]`` with ``w`` stored as [n, blocks, bytes], the first code in the lowest bits."""
    bits = FORMATS.get(builder.form.weight).bits
    transposed = Operator(
        name="", op_type="", weight_shape=builder.w.T.shape, input_shape=(), output_axis=0, input_axis=1
    )
    qarray = quantize_weight(builder.w.T, transposed, builder.form)
    n, k = qarray.q.shape
    packed = builder.constant("w_packed", pack_low_first(qarray.q.astype(np.uint8), bits).reshape(n, k // BLOCK, -1))
    scale = builder.constant("w_scale", qarray.params.scale)
    assert qarray.params.zero_point is not None
    zeros = qarray.params.zero_point
    if not qarray.params.spec.float_zero:
        zeros = pack_low_first(zeros.astype(np.uint8), bits)
    zero = builder.constant("w_zero_point", zeros)
    attributes = {"K": k, "N": n, "bits": bits, "block_size": BLOCK}
    builder.node("MatMulNBits", ["x", packed, scale, zero], "y", domain="com.microsoft", **attributes)


def pack_low_first(codes: Array, bits: int) -> Array:
    """Pack codes along the last axis into bytes, the first code in the lowest bits, the last byte padded with 0."""
    per_byte = 8 // bits
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per_byte)])
    groups = codes.reshape(*codes.shape[:-1], -1, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    return np.bitwise_or.reduce(groups << shifts, axis=-1)
