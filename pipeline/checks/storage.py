"""Rules about how codes are stored in the file. They look at lengths, never at large arrays."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from . import rule
from .context import Context, Problem, constant_of, text, type_name

BITS = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT16": 16, "UINT16": 16, "INT32": 32}
"""Bits per code where they are not 8."""


@rule("codes-complete", "error", do="write the file again; it is cut short or its shape is wrong")
def codes_complete(context: Context) -> Iterator[Problem]:
    """Stored codes have as many bytes as their shape and type need; 2 and 4-bit codes are packed.

    Source: ONNX TensorProto, ``raw_data`` and ``external_data``.
    """
    for site in context.sites:
        constant, kind = constant_of(site.x), type_name(site.x)
        proto = None if constant is None else _proto(constant)
        if proto is None or kind is None or site.is_quantize:
            continue
        count = int(np.prod([int(d) for d in proto.dims], dtype=np.int64))
        wanted = -(-count * BITS.get(kind, 8) // 8)
        found = _stored_bytes(proto)
        if found is not None and found != wanted:
            yield site.problem(f"{found} bytes", f"{wanted} for {kind} {text(tuple(proto.dims))}")


@rule("codes-in-range", "error", do="write the codes again, as raw_data")
def codes_in_range(context: Context) -> Iterator[Problem]:
    """Codes that are stored as 32-bit integers fit into the bits of their type.

    Source: ONNX TensorProto, ``int32_data``, which holds all integers up to 16 bits.
    """
    for site in context.sites:
        constant, kind = constant_of(site.x), type_name(site.x)
        proto = None if constant is None else _proto(constant)
        if proto is None or kind is None or kind == "INT32" or site.is_quantize or not proto.int32_data:
            continue
        # Packed and floating types are stored as the bit patterns of whole bytes.
        bits = max(8, BITS.get(kind, 8))
        signed = kind in ("INT8", "INT16")
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        data = np.asarray(proto.int32_data)
        if data.min() < low or data.max() > high:
            yield site.problem(f"codes from {data.min()} to {data.max()}", f"{low} to {high} for {kind}")


def _proto(constant: gs.Constant) -> onnx.TensorProto | None:
    # The attribute is private because reading .values replaces it by the array.
    stored = constant._values
    tensor = getattr(stored, "tensor", None)
    return tensor if isinstance(tensor, onnx.TensorProto) else None


def _stored_bytes(proto: onnx.TensorProto) -> int | None:
    """Return the bytes that hold the values, None where the length is not written down."""
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        entries = {entry.key: entry.value for entry in proto.external_data}
        return int(entries["length"]) if entries.get("length", "").isdigit() else None
    return len(proto.raw_data) if proto.HasField("raw_data") else None
