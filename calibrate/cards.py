"""Cards: what a number format can hold, and what becomes of one value in every format.

Plain data first (`format_card`, `value_card`), text afterwards (`render`), so that a caller can print either.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from typing import Any

import numpy as np

from .errors import UsageError
from .formats import FORMATS, Format
from .granularity import PER_TENSOR, per_block
from .qarray import QParams, Range, Spec, dequantize, params_from_range, params_from_scale, quantize


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatCard:
    """What a number format can hold.

    Attributes:
        name: qpipe's name of the format.
        kind: ``"int"``, ``"uint"``, ``"float"`` or ``"codebook"``.
        bits: Bits of one code.
        bits_per_value: The same with the scales of prescribed blocks counted in.
        sign_bits: 0 or 1.
        exponent_bits: 0 for integers and codebooks.
        mantissa_bits: Stored bits of the mantissa; the value bits of an integer, the index bits of a codebook.
        bias: Bias of the exponent; None without one.
        lowest: Smallest finite value.
        largest: Largest finite value.
        smallest_normal: Smallest positive value of full precision; the step 1 of an integer.
        smallest_subnormal: Smallest positive value; None where there are no subnormals.
        decimal_digits: Significant decimal digits, ``log10(2)`` times the bits of precision; None for codebooks.
        has_infinity: Whether infinity has a code.
        has_nan: Whether NaN has a code.
        values: All values by code, for formats of at most 4 bits.
        scale_format: Name of the format of the scales; None for a cast.
        block_size: Prescribed block size, 0 when free.
        scale_levels: Scales per code (see `Format`).
        onnx_type: Type in ``onnx.TensorProto.DataType``.
        min_opset: First opset that can carry it.
        lowering: How ONNX carries it (see `Format`).
        source: Where it is defined.
    """

    name: str
    kind: str
    bits: int
    bits_per_value: float
    sign_bits: int
    exponent_bits: int
    mantissa_bits: int
    bias: int | None
    lowest: float
    largest: float
    smallest_normal: float
    smallest_subnormal: float | None
    decimal_digits: float | None
    has_infinity: bool
    has_nan: bool
    values: tuple[float, ...]
    scale_format: str | None
    block_size: int
    scale_levels: int
    onnx_type: str
    min_opset: int
    lowering: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueCode:
    """One value in one format.

    Attributes:
        format: Name of the format.
        bits: The code, most significant bit first.
        scale: Real value of code 1; None for a cast.
        zero_point: Code of real zero.
        value: What the code means.
        error: `value` minus the value asked about.
        relative_error: ``|error / value asked about|``; None where that is 0 or not finite.
    """

    format: str
    bits: str
    scale: float | None
    zero_point: int
    value: float
    error: float
    relative_error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueCard:
    """One value in the format asked about, split into its fields, and in every other.

    Attributes:
        asked: The value as given, as a float64.
        code: The value in the format asked about.
        sign: Bits of the sign, empty when unsigned.
        exponent: Bits of the exponent, empty for integers and codebooks.
        mantissa: The other bits.
        others: The value in every format, wide ones first.
        scaling: Where the scales of `others` come from.
    """

    asked: float
    code: ValueCode
    sign: str
    exponent: str
    mantissa: str
    others: tuple[ValueCode, ...]
    scaling: str


def format_card(name: str) -> FormatCard:
    """Return the card of the format called ``name``.

    Raises:
        RecipeError: No such format; the message suggests near names.
    """
    fmt = FORMATS.get(name)
    sign, exponent, mantissa = _field_widths(fmt)
    floating = fmt.kind == "float"
    subnormals = floating and mantissa > 0
    precision = None if fmt.codebook else mantissa + floating
    return FormatCard(
        name=fmt.name,
        kind=fmt.kind,
        bits=fmt.bits,
        bits_per_value=fmt.bits_per_value,
        sign_bits=sign,
        exponent_bits=exponent,
        mantissa_bits=mantissa,
        bias=_bias(fmt) if floating else None,
        lowest=float(fmt.qmin),
        largest=float(fmt.qmax),
        smallest_normal=_smallest_normal(fmt),
        smallest_subnormal=float(fmt.float_info.smallest_subnormal) if subnormals else None,
        decimal_digits=None if precision is None else round(precision * math.log10(2), 2),
        has_infinity=floating and bool(np.isinf(_cast(math.inf, fmt))),
        has_nan=floating and bool(np.isnan(_cast(math.nan, fmt))),
        values=_all_values(fmt) if fmt.bits <= 4 else (),
        scale_format=fmt.scale_format if fmt.scale_levels else None,
        block_size=fmt.block_size,
        scale_levels=fmt.scale_levels,
        onnx_type=fmt.onnx_type,
        min_opset=fmt.min_opset,
        lowering=fmt.lowering,
        source=fmt.source,
    )


def value_card(value: float, name: str, *, scale: float | None = None, amax: float | None = None) -> ValueCard:
    """Return what becomes of ``value`` in the format called ``name`` and in every other.

    Formats with a scale get the one that maps ``|value|`` to their largest code, as if it were the largest magnitude
    of its tensor, or the one that is given; unsigned ones a zero point at the end where the value is not.

    Args:
        value: Any float64, also infinite or NaN.
        name: A format's name.
        scale: Real value of code 1, > 0.
        amax: Largest magnitude of the tensor, > 0, which scales are made for; ``|value|`` itself when None.

    Raises:
        RecipeError: No such format; the message suggests near names.
        UsageError: ``scale`` or ``amax`` is not positive and finite, or both are given.
    """
    if scale is not None and amax is not None:
        raise UsageError("a scale and a largest magnitude say the same thing twice", do="give --scale or --amax")
    for what, number in (("scale", scale), ("largest magnitude", amax)):
        if number is not None and not 0 < number < math.inf:
            do = "give --scale 0.05, --amax 6, or none"
            raise UsageError(f"a {what} must be positive and finite", found=str(number), do=do)
    fmt, chosen = FORMATS.get(name), _Scaling(scale=scale, amax=amax)
    code = _value_code(value, fmt, chosen)
    sign, exponent, _ = _field_widths(fmt)
    return ValueCard(
        asked=float(value),
        code=code,
        sign=code.bits[:sign],
        exponent=code.bits[sign : sign + exponent],
        mantissa=code.bits[sign + exponent :],
        others=tuple(_value_code(value, f, chosen) for f in _by_width() if f.lowering != "scale"),
        scaling=chosen.text(value),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scaling:
    """Where the scales of a card come from: given, or made for a largest magnitude."""

    scale: float | None
    amax: float | None

    def text(self, value: float) -> str:
        if self.scale is not None:
            return f"scale {self.scale:g} for all"
        reach = abs(value) if self.amax is None else self.amax
        more = "; --amax A or --scale S set another" if self.amax is None else ""
        return f"scales for a tensor whose largest magnitude is {reach:g}{more}"


def _by_width() -> list[Format]:
    return sorted((fmt for _, fmt in FORMATS.items()), key=lambda fmt: (-fmt.bits, fmt.kind, fmt.name))


def as_data(card: FormatCard | ValueCard) -> dict[str, Any]:
    """Return a card as dicts, tuples, strings and numbers that JSON can hold: non-finite numbers become strings."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: plain(value) for key, value in item.items()}
        if isinstance(item, tuple):
            return [plain(value) for value in item]
        return str(item) if isinstance(item, float) and not math.isfinite(item) else item

    data: dict[str, Any] = plain(asdict(card))
    return data


def render(card: FormatCard | ValueCard) -> str:
    """Return a card as text of several lines, without a final newline."""
    return _render_format(card) if isinstance(card, FormatCard) else _render_value(card)


def _field_widths(fmt: Format) -> tuple[int, int, int]:
    """Return the bits of sign, exponent and mantissa."""
    if fmt.kind == "float":
        info = fmt.float_info
        return fmt.bits - info.nexp - info.nmant, int(info.nexp), int(info.nmant)
    sign = 1 if fmt.kind == "int" else 0
    return sign, 0, fmt.bits - sign


def _smallest_normal(fmt: Format) -> float:
    if fmt.codebook:
        return min(abs(v) for v in fmt.codebook if v)
    return float(fmt.float_info.smallest_normal) if fmt.kind == "float" else 1.0


def _bias(fmt: Format) -> int:
    # The smallest normal value has the exponent field 1, or 0 where there are no subnormals to use it.
    lowest_field = 1 if fmt.float_info.nmant else 0
    return lowest_field - int(math.log2(float(fmt.float_info.smallest_normal)))


def _cast(value: float, fmt: Format) -> Any:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(value, np.float64).astype(fmt.dtype)


def _all_values(fmt: Format) -> tuple[float, ...]:
    if fmt.codebook:
        return fmt.codebook
    codes = np.arange(2**fmt.bits, dtype=np.uint8)
    if fmt.is_integer:
        return tuple(float(c - 2**fmt.bits if c > fmt.qmax else c) for c in codes.tolist())
    return tuple(codes.view(fmt.dtype).astype(np.float64).tolist())


def _value_code(value: float, fmt: Format, scaling: _Scaling) -> ValueCode:
    scale = None
    if fmt.lowering == "cast":
        q, zero, meant = _cast(value, fmt), 0, float(_cast(value, fmt))
    else:
        with np.errstate(over="ignore"):
            x = np.asarray([value], np.float32)
        qarray = quantize(x, _params(float(x[0]), fmt, scaling))
        params = qarray.params
        q, scale, meant = qarray.q, float(params.scale.ravel()[0]), float(dequantize(qarray)[0])
        zero = 0 if params.zero_point is None else int(params.zero_point.ravel()[0])
    error = 0.0 if meant == value else meant - value
    return ValueCode(
        format=fmt.name,
        bits=_bits(q, fmt),
        scale=scale,
        zero_point=zero,
        value=meant,
        error=error,
        relative_error=abs(error / value) if value and math.isfinite(error) else None,
    )


def _params(value: float, fmt: Format, scaling: _Scaling) -> QParams:
    """Return parameters for the one value [1]: from the scale given, else for the largest magnitude."""
    scale = scaling.scale
    spec = Spec(
        format=fmt,
        granularity=per_block(0, fmt.block_size) if fmt.block_size else PER_TENSOR,
        symmetric=fmt.kind != "uint",
    )
    shape = spec.granularity.scale_shape((1,))
    reach = value if scaling.amax is None else math.copysign(scaling.amax, value)
    if scale is None and math.isfinite(reach):
        return params_from_range(Range.of(np.full(shape, reach), np.full(shape, reach)), spec)
    params = params_from_scale(np.full(shape, 1.0 if scale is None else scale), spec)
    if spec.symmetric:
        return params
    return replace(params, zero_point=np.full(shape, fmt.qmax if value < 0 else 0, fmt.dtype))


def _bits(code: Any, fmt: Format) -> str:
    raw = int(np.asarray(code).ravel().view(f"u{code.dtype.itemsize}")[0])
    return format(raw & (2**fmt.bits - 1), f"0{fmt.bits}b")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.9g}"


def _render_format(card: FormatCard) -> str:
    rest = {"float": "mantissa", "codebook": "index"}.get(card.kind, "value")
    fields = [f"{card.sign_bits} sign", f"{card.mantissa_bits} {rest}"]
    if card.exponent_bits:
        fields.insert(1, f"{card.exponent_bits} exponent (bias {card.bias})")
    special = [word for word, has in (("infinity", card.has_infinity), ("NaN", card.has_nan)) if has]
    rows = {
        "bits": f"{card.bits}: {', '.join(fields)}",
        "bits per value": f"{card.bits_per_value:g} with its scales" if card.block_size else "",
        "largest": _number(card.largest),
        "lowest": _number(card.lowest),
        "smallest normal": _number(card.smallest_normal),
        "smallest subnormal": _number(card.smallest_subnormal),
        "decimal digits": _number(card.decimal_digits),
        "special values": " and ".join(special) or "none",
        "scale": _scale_text(card),
        "in ONNX": f"{card.onnx_type}, {_LOWERING[card.lowering]}, from opset {card.min_opset}",
        "source": card.source,
    }
    lines = [card.name, *(f"  {label:<19} {text}" for label, text in rows.items() if text)]
    if card.values:
        lines += ["  values by code", *_value_rows(card)]
    return "\n".join(lines)


_LOWERING = {
    "qdq": "QuantizeLinear/DequantizeLinear",
    "cast": "Cast",
    "bnb4": "packed for com.microsoft.MatMulBnb4",
    "scale": "only as the type of scales",
}


def _scale_text(card: FormatCard) -> str:
    if card.scale_format is None:
        return "none"
    block = f"one {card.scale_format} per block of {card.block_size}" if card.block_size else card.scale_format
    return f"{block}, times one float32 per tensor" if card.scale_levels == 2 else block


def _value_rows(card: FormatCard) -> list[str]:
    cells = [f"{code:0{card.bits}b} {value:<12.7g}" for code, value in enumerate(card.values)]
    return ["    " + " ".join(cells[i : i + 4]).rstrip() for i in range(0, len(cells), 4)]


def _render_value(card: ValueCard) -> str:
    split = " ".join(part for part in (card.sign, card.exponent, card.mantissa) if part)
    exact = format(Decimal(card.code.value), "f") if abs(card.code.value) < math.inf else str(card.code.value)
    lines = [
        f"{card.asked!r} in {card.code.format}",
        f"  bits                {split}",
        f"  stored exactly as   {exact}",
        f"  error               {_number(card.code.error)}",
        f"  in every format, {card.scaling}:",
        f"  {'format':<15} {'code':<22} {'scale':>15} {'zero':>5} {'value':>15} {'error':>15} {'relative':>10}",
    ]
    for code in card.others:
        bits = code.bits if len(code.bits) <= 16 else f"0x{int(code.bits, 2):0{len(code.bits) // 4}x}"
        relative = "-" if code.relative_error is None else f"{code.relative_error:.2e}"
        lines.append(
            f"  {code.format:<15} {bits:<22} {_number(code.scale):>15} {code.zero_point:>5} {_number(code.value):>15}"
            f" {_number(code.error):>15} {relative:>10}"
        )
    return "\n".join(lines)
