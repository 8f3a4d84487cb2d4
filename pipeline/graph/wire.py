"""A model file with its weights inside, written as the weights are made; the file is never held in memory.

The large initializers come last in the graph, which protobuf allows: the order of different fields means nothing.

Source: Protocol Buffers, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from .constants import Values
from .exporter import Skeleton
from .protos import header, location_of, without

_GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
_INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a model file, and the values whose bytes follow them.

    Attributes:
        head: The bytes.
        values: What comes after them, None for nothing.
    """

    head: bytes
    values: Values | None = None


def parts(built: Skeleton) -> Iterator[Part]:
    """Yield the parts of the model file; ``built`` loses what is not streamed to the file itself."""
    entries = [_entry(tensor, built) for tensor in built.proto.graph.initializer]
    light, graph = without(built.proto, "graph"), without(built.proto.graph, "initializer")
    built.fill_in(light)
    built.fill_in(graph)
    body = graph.SerializeToString(deterministic=True)
    length = len(body) + sum(len(part.head) + (part.values.nbytes if part.values else 0) for part in entries)
    yield Part(light.SerializeToString(deterministic=True) + tag_and_length(_GRAPH, length) + body)
    yield from entries


def _entry(tensor: onnx.TensorProto, built: Skeleton) -> Part:
    values = built.weights.get(location_of(tensor))
    if values is None:
        data = tensor.SerializeToString(deterministic=True)
        return Part(tag_and_length(_INITIALIZER, len(data)) + data)
    data = header(tensor).SerializeToString(deterministic=True) + tag_and_length(_RAW_DATA, values.nbytes)
    return Part(tag_and_length(_INITIALIZER, len(data) + values.nbytes) + data, values)


def tag_and_length(number: int, length: int) -> bytes:
    """Return what stands before the content of a field of so many bytes."""
    return _varint(number << 3 | 2) + _varint(length)


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])
