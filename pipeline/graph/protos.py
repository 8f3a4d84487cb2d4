"""TensorProto, the message that holds a weight: its types, its bytes, and finding all of them in a model.

Source: ONNX TensorProto: ``raw_data`` is little-endian, sub-byte elements packed from the low bits up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import Message
from onnx import TensorProto, numpy_helper

Array = npt.NDArray[Any]
M = TypeVar("M", bound=Message)

MAX_PROTO = 2**31 - 1
"""Largest serialized protobuf message in bytes."""

TYPES = {number: name for name, number in TensorProto.DataType.items()}
"""Name of each type number; UNDEFINED is 0."""

_SMALL = 2**16
_PACKED_BITS = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6}
_TENSORLESS = {"ValueInfoProto", "StringStringEntryProto", "OperatorSetIdProto", "TypeProto", "TensorAnnotation"}


def type_name(onnx_type: int) -> str:
    """Return the name of a type number, e.g. ``"INT4"``.

    Raises:
        KeyError: There is no such type, or it is UNDEFINED.
    """
    if not onnx_type:
        raise KeyError(onnx_type)
    return TYPES[onnx_type]


def numpy_type(onnx_type: int) -> np.dtype[Any]:
    """Return the numpy (or ml_dtypes) type of unpacked elements of an ONNX type."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx_type))


def onnx_type_of(dtype: npt.DTypeLike) -> int:
    """Return the ONNX type number of a numpy or ml_dtypes type."""
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def byte_size(onnx_type: int, dims: Iterable[int]) -> int:
    """Return how many bytes the packed elements of a tensor take."""
    bits = _PACKED_BITS.get(type_name(onnx_type)) or numpy_type(onnx_type).itemsize * 8
    return (math.prod(dims) * bits + 7) // 8


def is_packed(onnx_type: int) -> bool:
    """Whether several elements share a byte."""
    return type_name(onnx_type) in _PACKED_BITS


def header(tensor: TensorProto) -> TensorProto:
    """Return a copy of ``tensor`` without its data: name, type, dimensions, documentation."""
    bare = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    if tensor.doc_string:
        bare.doc_string = tensor.doc_string
    bare.metadata_props.extend(tensor.metadata_props)
    return bare


def without(message: M, *fields: str) -> M:
    """Return a copy of a message without some of its fields."""
    rest = type(message)()
    for descriptor, value in message.ListFields():
        if descriptor.name in fields:
            continue
        if hasattr(value, "ListFields"):
            getattr(rest, descriptor.name).CopyFrom(value)
        elif hasattr(value, "MergeFrom"):
            getattr(rest, descriptor.name).MergeFrom(value)
        else:
            setattr(rest, descriptor.name, value)
    return rest


def without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model whose large initializers have no data; nothing large is copied on the way."""
    light = without(proto, "graph")
    light.graph.CopyFrom(without(proto.graph, "initializer"))
    for tensor in proto.graph.initializer:
        bare = light.graph.initializer.add()
        # Its sizes say how much data it has: looking at the data itself would copy it.
        if not tensor.HasField("raw_data") or byte_size(tensor.data_type, tensor.dims) <= _SMALL:
            bare.CopyFrom(tensor)
        else:
            bare.CopyFrom(header(tensor))
            refer(bare, location="#")
    return light


def pack(array: Array) -> Array:
    """Return the bytes [n] that ``raw_data`` holds for unpacked elements, as an array of uint8.

    2 and 4-bit elements, which ml_dtypes holds in a byte each, are moved together in words of 4 and 2 of them.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    bits = _PACKED_BITS.get(type_name(onnx_type_of(flat.dtype)), 8)
    if bits not in (2, 4):
        return np.frombuffer(numpy_helper.from_array(flat).raw_data, np.uint8) if bits == 6 else flat.view(np.uint8)
    count = 8 // bits
    bytewise = flat.view(np.uint8)
    if len(bytewise) % count:
        bytewise = np.concatenate([bytewise, np.zeros(-len(bytewise) % count, np.uint8)])
    words, mask = bytewise.view(f"<u{count}"), 2**bits - 1
    packed = words & mask
    for place in range(1, count):
        packed |= (words >> (8 - bits) * place) & (mask << bits * place)
    return packed.astype(np.uint8)


def unpack(data: Any, tensor: TensorProto) -> Array:
    """Return the elements [dims] that the packed bytes ``data`` stand for; a view where elements fill bytes."""
    if is_packed(tensor.data_type):
        filled = header(tensor)
        filled.raw_data = bytes(data)
        return numpy_helper.to_array(filled)
    return np.frombuffer(data, dtype=numpy_type(tensor.data_type)).reshape(tuple(tensor.dims))


def all_tensors(message: Any) -> Iterator[TensorProto]:
    """Yield every TensorProto inside a protobuf message: initializers, attributes, functions, sparse parts."""
    if isinstance(message, TensorProto):
        yield message
        return
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None or descriptor.message_type.name in _TENSORLESS:
            continue
        for part in (value,) if hasattr(value, "ListFields") else value:
            yield from all_tensors(part)


def flaws(message: Any) -> Iterator[str]:
    """Yield what makes a message unreadable although it parses: names that are no UTF-8, unknown element types."""
    for descriptor, value in _texts_of(message) if isinstance(message, TensorProto) else message.ListFields():
        if descriptor.type == descriptor.TYPE_STRING:
            # protobuf hands out text that is no UTF-8 as bytes instead of refusing it.
            texts = (value,) if isinstance(value, str | bytes) else value
            yield from (f"the name {text!r}, which is no UTF-8" for text in texts if isinstance(text, bytes))
        elif descriptor.name == "elem_type" and isinstance(value, int):
            if value not in TYPES:
                yield f"element type {value}, which does not exist"
        elif descriptor.message_type is not None:
            for part in (value,) if hasattr(value, "ListFields") else value:
                yield from flaws(part)


def _texts_of(tensor: TensorProto) -> Iterator[tuple[Any, Any]]:
    """Yield the fields of a tensor that hold text or messages, and what is in them."""
    for name in ("name", "doc_string", "external_data", "metadata_props"):
        yield TensorProto.DESCRIPTOR.fields_by_name[name], getattr(tensor, name)


def keyed_tensors(message: Any) -> Iterator[TensorProto]:
    """Yield every tensor inside a message whose data is elsewhere."""
    return (tensor for tensor in all_tensors(message) if tensor.data_location == TensorProto.EXTERNAL)


def location_of(tensor: TensorProto) -> str:
    """Return the ``location`` of a tensor with external data, empty when it has none."""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def refer(tensor: TensorProto, **entries: str | int) -> None:
    """Make ``tensor`` one with external data at ``location=..., offset=..., length=...``."""
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))


def embed(tensor: TensorProto, data: bytes) -> None:
    """Put packed bytes into a tensor whose data was elsewhere."""
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = data
