"""The operator as a model-local function in standard ONNX operators: the same file runs without the plugin.

Integer part: ``MatMulInteger`` with both operands unsigned (code + 128, zero point 128). ONNX Runtime's optimized
unsigned x signed kernels saturate 16-bit sums on x86 without VNNI; its unsigned x unsigned kernels do not, on any
level of optimization, and neither do other runtimes. It costs about a quarter to a half of the speed of the saturating
form and is faster than the float32 product. The unsigned weight is computed from ``w_q`` by nodes that have only
constant inputs, which runtimes fold when they load the model.

A model that is to run in every runtime gives the bias (zeros if need be) and at least one outlier column and one row:
OpenVINO fails on the omitted bias and on an empty index, ``onnx.reference`` wants at least an empty name for the bias,
ONNX Runtime's reductions fail on no rows, and tract gives a one-dimensional X a two-dimensional result.

The inverse of the scale is minus -1 / scale: ONNX Runtime rewrites ``(1 / scale) * x`` to ``x / scale``, which rounds
ties another way.

Differences from the kernel: none in the integer part; the rest is float32 in another order of operations.
"""

from __future__ import annotations

import onnx
from onnx import parser

from ...calibrate.errors import UnsupportedError
from .contract import DOMAIN, INPUTS, MAX_NEW_OUTLIERS, ONE_DIGIT, OP_TYPE, OUTPUTS, TWO_DIGITS

OLDEST_OPSET = 13
_CAST_LIKE_OPSET = 15
_AXES_INPUT_OPSET = 18

_SPLIT = """
    zero = Constant <value = float {0}> ()
    last = Constant <value = int64[1] {-1}> ()
    first = Constant <value = int64[1] {0}> ()
    second = Constant <value = int64[1] {1}> ()
    zero_point = Constant <value = uint8 {128}> ()
    offset = Constant <value = float {128}> ()
    offset_int = Constant <value = int32 {128}> ()
    wide = Cast <to = 1> (x)
    x_shape = Shape (x)
    inputs = Gather (x_shape, last)
    all_columns = ConstantOfShape <value = int32[1] {1}> (inputs)
    index_zero = Sub (outlier_index, outlier_index)
    regular_columns = ScatterElements <axis = 0> (all_columns, outlier_index, index_zero)
    is_regular = Cast <to = 9> (regular_columns)
    regular = Where (is_regular, wide, zero)
    times_zero = Mul (regular, zero)
    poison = ReduceSum <keepdims = 1> (times_zero, last)
    is_finite = Equal (poison, zero)
    safe = Where (is_finite, regular, zero)
    magnitude = Abs (safe)
    smallest_scale = Constant <value = float {1.1754943508222875e-38}> ()
    minus_one = Constant <value = float {-1}> ()
    w_columns = Transpose <perm = [1, 0]> (w_q)
    w_unpadded = Slice (w_columns, first, inputs, first)
    w_int = Cast <to = 6> (w_unpadded)
    w_shifted = Add (w_int, offset_int)
    w_unsigned = Cast <to = 2> (w_shifted)
"""

_ONE_DIGIT_CODES = f"""
    one_digit = Constant <value = float {{{ONE_DIGIT}}}> ()
    minus_one_digit = Neg (one_digit)
    amax = ReduceMax AXES (magnitude AXES_INPUT)
    scale_raw = Div (amax, one_digit)
    scale = Max (scale_raw, smallest_scale)
    minus_inverse = Div (minus_one, scale)
    inverse = Neg (minus_inverse)
    scaled = Mul (safe, inverse)
    rounded = Round (scaled)
    codes = Clip (rounded, minus_one_digit, one_digit)
    shifted = Add (codes, offset)
    unsigned = Cast <to = 2> (shifted)
    sums = MatMulInteger (unsigned, w_unsigned, zero_point, zero_point)
    new_outliers = Constant <value = int64 {{0}}> ()
"""

_TWO_DIGIT_CODES = f"""
    limit = Constant <value_float: float = @limit> ()
    one_digit = Constant <value = float {{{ONE_DIGIT}}}> ()
    two_digits = Constant <value = float {{{TWO_DIGITS}}}> ()
    most = Constant <value = float {{{MAX_NEW_OUTLIERS}}}> ()
    any_magnitude = Abs (regular)
    above = Greater (any_magnitude, limit)
    is_on = Greater (limit, zero)
    beyond = And (above, is_on)
    beyond_float = Cast <to = 1> (beyond)
    met = ReduceSum <keepdims = 1> (beyond_float, last)
    met_total = ReduceSum <keepdims = 0> (met)
    new_outliers = Cast <to = 7> (met_total)
    is_few = LessOrEqual (met, most)
    is_two_digits = And (beyond, is_few)
    bound = Where (is_two_digits, two_digits, one_digit)
    minus_bound = Neg (bound)
    scale_each = Div (magnitude, bound)
    scale_raw = ReduceMax AXES (scale_each AXES_INPUT)
    scale = Max (scale_raw, smallest_scale)
    minus_inverse = Div (minus_one, scale)
    inverse = Neg (minus_inverse)
    scaled = Mul (safe, inverse)
    rounded = Round (scaled)
    capped = Min (rounded, bound)
    codes = Max (capped, minus_bound)
    parts = Div (codes, offset)
    parts_rounded = Round (parts)
    high = Where (is_two_digits, parts_rounded, zero)
    high_value = Mul (high, offset)
    low = Sub (codes, high_value)
    low_shifted = Add (low, offset)
    low_unsigned = Cast <to = 2> (low_shifted)
    low_sums = MatMulInteger (low_unsigned, w_unsigned, zero_point, zero_point)
    has_new = Greater (met_total, zero)
    sums = If (has_new) <
        then_branch = with_high_digits () => (then_sums) {{
            high_shifted = Add (high, offset)
            high_unsigned = Cast <to = 2> (high_shifted)
            high_sums = MatMulInteger (high_unsigned, w_unsigned, zero_point, zero_point)
            high_weighted = Mul (high_sums, offset_int)
            then_sums = Add (low_sums, high_weighted)
        }},
        else_branch = without () => (else_sums) {{
            else_sums = Identity (low_sums)
        }}
    >
"""

_EPILOGUE = """
    poisoned_scale = Add (scale, poison)
    sums_float = Cast <to = 1> (sums)
    by_row = Mul (sums_float, poisoned_scale)
    by_column = Mul (by_row, w_scale)
    x_outlier = Gather <axis = -1> (wide, outlier_index)
    outliers = Shape (outlier_index)
    w_outlier_unpadded = Slice (w_outlier, first, outliers, second)
    w_outlier_float = Cast <to = 1> (w_outlier_unpadded)
    w_outlier_columns = Transpose <perm = [1, 0]> (w_outlier_float)
    from_outliers = MatMul (x_outlier, w_outlier_columns)
    without_bias = Add (by_column, from_outliers)
    no_input = Constant <value = float[1, 1] {0}> ()
    as_row = Unsqueeze (w_scale, first)
    bias_row = Gemm (no_input, as_row, bias)
    bias_or_zero = Squeeze (bias_row, first)
    y_float = Add (without_bias, bias_or_zero)
"""


def function_proto(*, opset: int, dynamic: bool = False) -> onnx.FunctionProto:
    """Return the body of ``qpipe.OutlierMatMul`` for models of one opset.

    Args:
        opset: The model's version of the default domain, 13 or newer (15 for 16-bit activations).
        dynamic: Carry the handling of new outliers (attribute ``limit``), an ``If`` whose costly branch runs only when
            some are met. Without it the attribute is ignored and the counter stays 0.

    Raises:
        UnsupportedError: The opset is older than that.

    Source: ONNX operators MatMulInteger, Gemm (whose optional third input carries the bias).
    """
    if opset < OLDEST_OPSET:
        raise UnsupportedError(
            "OutlierMatMul's function body needs a newer opset", found=str(opset), expected=f"{OLDEST_OPSET} or newer"
        )
    body = _SPLIT + (_TWO_DIGIT_CODES if dynamic else _ONE_DIGIT_CODES) + _EPILOGUE
    if opset >= _AXES_INPUT_OPSET:
        body = body.replace("AXES_INPUT", ", last").replace("AXES", "<keepdims = 1>")
    else:
        body = body.replace("AXES_INPUT", "").replace("AXES", "<axes = [-1], keepdims = 1>")
    body += "y = CastLike (y_float, x)" if opset >= _CAST_LIKE_OPSET else "y = Identity (y_float)"
    text = (
        f'<opset_import: ["": {opset}], domain: "{DOMAIN}">\n'
        f"{OP_TYPE} <limit: float = 0.0, padding: int = 16> ({', '.join(INPUTS)}) => ({', '.join(OUTPUTS)}) {{{body}}}"
    )
    return parser.parse_function(text)
