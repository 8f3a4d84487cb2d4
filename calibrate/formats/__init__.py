"""Number formats: everything about a number type is a field of its `Format`, never a branch elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A number type that ONNX can carry.

    Attributes:
        name: qpipe's name, e.g. ``"int8"``, ``"float8_e4m3fn"``.
        bits: Bits that one value takes, scales not counted.
        kind: ``"int"`` (signed), ``"uint"``, ``"float"`` or ``"codebook"`` (the code is an index into `codebook`).
        qmin: Smallest finite code (integers) or value (others).
        qmax: Largest finite code (integers) or value (others).
        dtype: numpy or ml_dtypes type of an unpacked array of codes.
        onnx_type: Name in ``onnx.TensorProto.DataType``, e.g. ``"INT8"``; of the packed bytes for a codebook.
        min_opset: First opset whose operators (see `lowering`) take the type with scales of `scale_format`.
        plain_opset: First opset whose operators take the codes of a block format with its scales written as float32; 0
            for `min_opset`.
        scale_format: Name of the format of the scales, ``"float32"`` unless the format prescribes another.
        block_size: Block size that the format prescribes, 0 when free.
        source: Where the format is defined.
        lowering: How ONNX carries a tensor of it: ``"qdq"`` (QuantizeLinear/DequantizeLinear), ``"cast"`` (Cast, no
            scale), ``"bnb4"`` (ONNX Runtime's MatMulBnb4, weights only) or ``"scale"`` (only as the type of scales).
        scale_levels: Scales that one code is multiplied by: 0 for a cast; 2 when the scale of a block is itself a code
            against one float32 scale per tensor, which takes two DequantizeLinear in a chain; else 1.
        scale_rule: How a scale is brought to `scale_format`: ``"nearest"``, ``"up"`` (nothing saturates) or
            ``"floor"`` (the rule of the OCP Microscaling specification: see `params_from_range`).
        codebook: Value of each code of a codebook format, relative to the scale; empty for the others.
    """

    name: str
    bits: int
    kind: str
    qmin: float
    qmax: float
    dtype: npt.DTypeLike
    onnx_type: str
    min_opset: int = 10
    scale_format: str = "float32"
    block_size: int = 0
    source: str = ""
    lowering: str = "qdq"
    scale_levels: int = 1
    scale_rule: str = "nearest"
    codebook: tuple[float, ...] = ()
    plain_opset: int = 0

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers (and a zero point makes sense)."""
        return self.kind in ("int", "uint")

    @property
    def is_signed(self) -> bool:
        """Whether negative values have codes without a zero point."""
        return self.kind != "uint"

    @property
    def bits_per_value(self) -> float:
        """Bits per value with the scales of the prescribed blocks counted in (MXFP4: 4.25); `bits` without blocks."""
        if not self.block_size:
            return float(self.bits)
        return self.bits + FORMATS.get(self.scale_format).bits / self.block_size

    @property
    def float_info(self) -> Any:
        """``ml_dtypes.finfo`` of the codes of a float format: ``nexp``, ``nmant``, ``smallest_normal`` and so on."""
        return ml_dtypes.finfo(self.dtype)  # type: ignore[no-untyped-call]

    def zeros(self, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return an array of zero codes of this type, of the given shape."""
        return np.zeros(shape, dtype=self.dtype)


FORMATS: Registry[Format] = Registry("number format", __name__)
