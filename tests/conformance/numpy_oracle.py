"""What a quantized model means, in numpy: a small interpreter that rounds nowhere but in `qpipe.calibrate.qarray`.

`run` executes models of the operators that quantization uses. QuantizeLinear and DequantizeLinear are qpipe's own
arithmetic; the QLinear* and *Integer operators are composed of it (exact integer sums, one multiplication, then
`quantize`); float operators sum in float64, so that every runtime is compared with one more exact than itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from qpipe.calibrate.formats import FORMATS, Format
from qpipe.calibrate.formats.codebook import BNB4_QUANT_TYPE, unpack_bnb4
from qpipe.calibrate.granularity import PER_TENSOR, Granularity, per_block, per_channel
from qpipe.calibrate.qarray import QArray, QParams, Spec, dequantize, quantize

Array = np.ndarray[Any, Any]
Attributes = Mapping[str, Any]

FORMAT_OF_DTYPE: dict[Any, Format] = {
    np.dtype(fmt.dtype): fmt
    for _, fmt in FORMATS.items()
    if not fmt.block_size and not fmt.codebook and fmt.lowering in ("qdq", "scale")
}


def run(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """Execute ``model`` and return its outputs.

    Args:
        model: Operators of the ONNX domain that `OPERATORS` lists.
        feeds: Arrays by input name.

    Raises:
        NotImplementedError: An operator is not in `OPERATORS`.
    """
    values: dict[str, Array] = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    values.update(feeds)
    for node in model.graph.node:
        if node.op_type not in OPERATORS:
            raise NotImplementedError(f"the oracle has no {node.op_type}")
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        inputs = [values[name] if name else None for name in node.input]
        outputs = OPERATORS[node.op_type](attributes, inputs)
        values.update(zip(node.output, outputs if isinstance(outputs, tuple) else (outputs,), strict=False))
    return [values[output.name] for output in model.graph.output]


def _params(fmt: Format, scale: Array, zero: Array | None, rank: int, attributes: Attributes) -> QParams:
    """ONNX's scale [d] with an axis becomes qpipe's scale of the array's rank."""
    axis, block_size = int(attributes.get("axis", 1)), int(attributes.get("block_size", 0))
    granularity: Granularity = PER_TENSOR
    shape: tuple[int, ...] = ()
    if block_size:
        granularity, shape = per_block(axis, block_size), scale.shape
    elif scale.size > 1:
        granularity, shape = per_channel(axis), tuple(-1 if i == axis % rank else 1 for i in range(rank))
    return QParams(
        scale=scale.astype(np.float32).reshape(shape),
        zero_point=None if zero is None or not fmt.is_integer else zero.reshape(shape),
        spec=Spec(format=fmt, granularity=granularity),
    )


def _quantize_linear(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    x, scale, zero = (*inputs, None)[:3]
    elem_type = attributes.get("output_dtype") or onnx.TensorProto.UINT8
    dtype = helper.tensor_dtype_to_np_dtype(elem_type) if zero is None else zero.dtype
    return quantize(x, _params(FORMAT_OF_DTYPE[np.dtype(dtype)], scale, zero, x.ndim, attributes)).q


def _dequantize_linear(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    q, scale, zero = (*inputs, None)[:3]
    if q.dtype == np.int32:  # a bias: exact in float64, scaled by s_x * s_w
        shape = [-1 if i == int(attributes.get("axis", 1)) % q.ndim else 1 for i in range(q.ndim)]
        return (q * (scale.reshape(shape) if scale.size > 1 else scale).astype(np.float64)).astype(np.float32)
    values = dequantize(QArray(q=q, params=_params(FORMAT_OF_DTYPE[q.dtype], scale, zero, q.ndim, attributes)))
    elem_type = attributes.get("output_dtype", 0)
    return values.astype(helper.tensor_dtype_to_np_dtype(elem_type) if elem_type else scale.dtype)


def _dynamic_quantize_linear(_: Attributes, inputs: Sequence[Any]) -> tuple[Array, Array, Array]:
    """The operator prescribes float32 at each step, where `params_from_range` works in float64."""
    x = np.asarray(inputs[0])
    lo, hi = np.minimum(x.min(), np.float32(0)), np.maximum(x.max(), np.float32(0))
    scale = np.asarray((hi - lo) / np.float32(255))
    zero = np.clip(np.rint(np.float32(0) - lo / scale), 0, 255).astype(np.uint8)
    params = QParams(scale=scale, zero_point=zero, spec=Spec(format=FORMATS.get("uint8")))
    return quantize(x, params).q, scale, zero


def _less_zero(q: Array, zero: Array | None, axis: int) -> Array:
    """``q - zero_point`` in float64, where sums of integers are exact; a zero point [n] goes along ``axis``."""
    values = q.astype(np.float64)
    if zero is None:
        return values
    if zero.size == 1:
        return values - zero.astype(np.float64).ravel()[0]
    return values - zero.astype(np.float64).reshape([-1 if i == axis % q.ndim else 1 for i in range(q.ndim)])


def _requantize(sums: Array, multiplier: Array, scale: Array, zero: Array) -> Array:
    """``quantize(sums * s_x * s_w)`` with the scale and zero point of the output."""
    real = (sums * multiplier.astype(np.float64)).astype(np.float32)
    return quantize(real, _params(FORMAT_OF_DTYPE[zero.dtype], scale.ravel()[0], zero.ravel()[0], 1, {})).q


def _matmul_integer(_: Attributes, inputs: Sequence[Any]) -> Array:
    a, b, a_zero, b_zero = (*inputs, None, None)[:4]
    return (_less_zero(a, a_zero, -2) @ _less_zero(b, b_zero, -1)).astype(np.int32)


def _qlinear_matmul(_: Attributes, inputs: Sequence[Any]) -> Array:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = inputs
    sums = _less_zero(a, a_zero, -2) @ _less_zero(b, b_zero, -1)
    return _requantize(sums, a_scale.astype(np.float32) * b_scale.astype(np.float32), y_scale, y_zero)


def _conv_integer(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    x, w, x_zero, w_zero = (*inputs, None, None)[:4]
    return conv(_less_zero(x, x_zero, 1), _less_zero(w, w_zero, 0), attributes).astype(np.int32)


def _qlinear_conv(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = inputs[:8]
    sums = conv(_less_zero(x, x_zero, 1), _less_zero(w, w_zero, 0), attributes)
    if len(inputs) > 8:
        sums = sums + inputs[8].reshape(1, -1, *[1] * (x.ndim - 2))
    multiplier = (x_scale * w_scale).reshape(1, -1, *[1] * (x.ndim - 2))
    return _requantize(sums, multiplier, y_scale, y_zero)


def conv(x: Array, w: Array, attributes: Attributes) -> Array:
    """Convolve ``x [n, c, h, w]`` with ``w [o, c / group, kh, kw]`` in float64."""
    (top, left, bottom, right), strides, dilations, group = _window(attributes)
    x = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    kernel = w.astype(np.float64)
    out, _, kh, kw = kernel.shape
    height = (x.shape[2] - (kh - 1) * dilations[0] - 1) // strides[0] + 1
    width = (x.shape[3] - (kw - 1) * dilations[1] - 1) // strides[1] + 1
    y = np.zeros((x.shape[0], group, out // group, height, width))
    x = x.reshape(x.shape[0], group, -1, *x.shape[2:])
    kernel = kernel.reshape(group, out // group, -1, kh, kw)
    for i, j in np.ndindex(kh, kw):
        rows = slice(i * dilations[0], i * dilations[0] + (height - 1) * strides[0] + 1, strides[0])
        columns = slice(j * dilations[1], j * dilations[1] + (width - 1) * strides[1] + 1, strides[1])
        y += np.einsum("ngchw,goc->ngohw", x[..., rows, columns], kernel[..., i, j])
    return y.reshape(y.shape[0], out, height, width)


def conv_transpose(x: Array, w: Array, attributes: Attributes) -> Array:
    """Spread ``x [n, c, h, w]`` by ``w [c, o / group, kh, kw]`` in float64: the adjoint of `conv`."""
    (top, left, bottom, right), strides, dilations, group = _window(attributes)
    per_group, (kh, kw) = w.shape[1], w.shape[2:]
    height = (x.shape[2] - 1) * strides[0] + (kh - 1) * dilations[0] + 1
    width = (x.shape[3] - 1) * strides[1] + (kw - 1) * dilations[1] + 1
    y = np.zeros((x.shape[0], group, per_group, height, width))
    inputs = x.astype(np.float64).reshape(x.shape[0], group, -1, *x.shape[2:])
    kernel = w.astype(np.float64).reshape(group, -1, per_group, kh, kw)
    for i, j in np.ndindex(kh, kw):
        rows = slice(i * dilations[0], i * dilations[0] + (x.shape[2] - 1) * strides[0] + 1, strides[0])
        columns = slice(j * dilations[1], j * dilations[1] + (x.shape[3] - 1) * strides[1] + 1, strides[1])
        y[..., rows, columns] += np.einsum("ngchw,gco->ngohw", inputs, kernel[..., i, j])
    return y.reshape(y.shape[0], group * per_group, height, width)[:, :, top : height - bottom, left : width - right]


def _window(attributes: Attributes) -> tuple[list[int], list[int], list[int], int]:
    pads = list(attributes.get("pads", [0, 0, 0, 0]))
    return pads, *(list(attributes.get(key, [1, 1])) for key in ("strides", "dilations")), attributes.get("group", 1)


def _convolution(function: Callable[[Array, Array, Attributes], Array]) -> Callable[[Attributes, Sequence[Any]], Array]:
    def apply(attributes: Attributes, inputs: Sequence[Any]) -> Array:
        y = function(inputs[0], inputs[1], attributes)
        if len(inputs) > 2:
            y = y + inputs[2].astype(np.float64).reshape(1, -1, 1, 1)
        return y.astype(inputs[0].dtype)

    return apply


def _matmul(_: Attributes, inputs: Sequence[Any]) -> Array:
    return np.matmul(inputs[0].astype(np.float64), inputs[1].astype(np.float64)).astype(inputs[0].dtype)


def _gemm(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    a, b = (
        matrix.astype(np.float64).T if attributes.get(key, 0) else matrix.astype(np.float64)
        for key, matrix in zip(("transA", "transB"), inputs, strict=False)
    )
    y = attributes.get("alpha", 1.0) * (a @ b)
    if len(inputs) > 2:
        y = y + attributes.get("beta", 1.0) * inputs[2]
    return np.asarray(y.astype(inputs[0].dtype))


def _reduce(ufunc: np.ufunc) -> Callable[[Attributes, Sequence[Any]], Array]:
    return lambda attributes, inputs: np.asarray(
        ufunc.reduce(inputs[0], axis=None, keepdims=bool(attributes.get("keepdims", 1)))
    )


def _matmul_bnb4(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    x, packed, amax = inputs
    name = next(name for name, kind in BNB4_QUANT_TYPE.items() if kind == attributes["quant_type"])
    n, k, block_size = (attributes[key] for key in ("N", "K", "block_size"))
    spec = Spec(format=FORMATS.get(name), granularity=per_block(1, block_size))
    params = QParams(scale=amax.reshape(n, -1), zero_point=None, spec=spec)
    return _matmul({}, [x, dequantize(QArray(q=unpack_bnb4(packed, (n, k)), params=params)).T])


def _matmul_nbits(attributes: Attributes, inputs: Sequence[Any]) -> Array:
    x, packed, scale, zero = (*inputs, None)[:4]
    n, k, bits, block_size = (attributes[key] for key in ("N", "K", "bits", "block_size"))
    fmt = FORMATS.get(f"uint{bits}")
    spec = Spec(format=fmt, granularity=per_block(1, block_size))
    scale = scale.reshape(n, -1)
    if zero is None:  # the middle of the codes
        zero = np.full(scale.shape, 2 ** (bits - 1), fmt.dtype)
    elif zero.dtype == np.uint8:
        zero = _unpack_low_first(zero.reshape(n, -1), bits)[:, : scale.shape[1]].astype(fmt.dtype)
    else:  # no codes, but real numbers
        zero = zero.reshape(n, -1).astype(np.float32)
    codes = _unpack_low_first(packed.reshape(n, -1), bits)[:, :k].astype(fmt.dtype)
    return _matmul({}, [x, dequantize(QArray(q=codes, params=QParams(scale=scale, zero_point=zero, spec=spec))).T])


def _unpack_low_first(packed: Array, bits: int) -> Array:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (packed[..., None] >> shifts & np.uint8(2**bits - 1)).reshape(*packed.shape[:-1], -1)


OPERATORS: dict[str, Callable[[Attributes, Sequence[Any]], Any]] = {
    "QuantizeLinear": _quantize_linear,
    "DequantizeLinear": _dequantize_linear,
    "DynamicQuantizeLinear": _dynamic_quantize_linear,
    "MatMulInteger": _matmul_integer,
    "QLinearMatMul": _qlinear_matmul,
    "ConvInteger": _conv_integer,
    "QLinearConv": _qlinear_conv,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _convolution(conv),
    "ConvTranspose": _convolution(conv_transpose),
    "MatMulBnb4": _matmul_bnb4,
    "MatMulNBits": _matmul_nbits,
    "Constant": lambda attributes, _: numpy_helper.to_array(attributes["value"]),
    "Cast": lambda attributes, inputs: inputs[0].astype(helper.tensor_dtype_to_np_dtype(attributes["to"])),
    "Identity": lambda _, inputs: inputs[0],
    "Sub": lambda _, inputs: np.asarray(inputs[0] - inputs[1]),
    "Div": lambda _, inputs: np.asarray(inputs[0] / inputs[1]),
    "Mul": lambda _, inputs: np.asarray(inputs[0] * inputs[1]),
    "Min": lambda _, inputs: np.minimum(*inputs),
    "Max": lambda _, inputs: np.maximum(*inputs),
    "Round": lambda _, inputs: np.rint(inputs[0]),
    "Clip": lambda _, inputs: np.clip(*inputs),
    "ReduceMin": _reduce(np.minimum),
    "ReduceMax": _reduce(np.maximum),
}
