"""Number formats: everything about a number type is a field of its `Format`, never a branch elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A number type that ONNX can carry.

    Attributes:
        name: qpipe's name, e.g. ``"int8"``, ``"float8_e4m3fn"``.
        bits: Bits that one value takes.
        kind: ``"int"`` (signed), ``"uint"`` or ``"float"``.
        qmin: Smallest finite code (integers) or value (floats).
        qmax: Largest finite code (integers) or value (floats).
        dtype: numpy or ml_dtypes type of an unpacked array of codes.
        onnx_type: Name in ``onnx.TensorProto.DataType``, e.g. ``"INT8"``.
        min_opset: First opset whose QuantizeLinear/DequantizeLinear take the type.
        scale_format: Name of the format of the scales, ``"float32"`` unless the format prescribes another.
        block_size: Block size that the format prescribes, 0 when free.
        source: Where the format is defined.
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

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers (and a zero point makes sense)."""
        return self.kind != "float"

    @property
    def is_signed(self) -> bool:
        """Whether negative codes exist."""
        return self.kind != "uint"

    def zeros(self, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return an array of zero codes of this type, of the given shape."""
        return np.zeros(shape, dtype=self.dtype)


FORMATS: Registry[Format] = Registry("number format", __name__)
