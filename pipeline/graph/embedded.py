"""Weights inside a model file, found in its bytes before it is parsed: protobuf would copy them at every look.

A model file is a message whose field ``graph`` holds one message per initializer, whose field ``raw_data`` holds the
weight. Anything unusual (a message cut off, a field that comes twice) is left for the parser to merge or to refuse.

Source: Protocol Buffers, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import onnx

from .constants import EmbeddedValues, Values
from .protos import TYPES, byte_size, header, refer
from .wire import tag_and_length

LARGE = 2**16
"""Bytes from which on a weight is worth the trouble."""

_GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
_INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER
_VARINT, _BYTES = 0, 2
_WIDTHS = {1: 8, 5: 4}
_UNSIZED = (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING)


class _UnusualError(Exception):
    """The bytes are no message that this module reads."""


class _Field(NamedTuple):
    """A field of a message: its number, and where its tag, its content and what comes behind it begin."""

    number: int
    start: int
    content: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A model file less its large weights.

    Attributes:
        rest: The file without them, to be parsed.
        weights: Bytes of the large weights by the number of their initializer.
    """

    rest: bytes
    weights: dict[int, memoryview] = field(default_factory=dict)

    def attach(self, proto: onnx.ModelProto) -> dict[str, Values] | None:
        """Make the initializers of the parsed `rest` refer to their weights; return these by key.

        None where a weight does not fit its initializer: then the whole file is to be parsed and judged.
        """
        found: dict[str, Values] = {}
        for number, data in self.weights.items():
            tensor = proto.graph.initializer[number]
            known = tensor.data_type in TYPES and tensor.data_type not in _UNSIZED
            if not known or tensor.data_location or byte_size(tensor.data_type, tensor.dims) != len(data):
                return None
            values = EmbeddedValues(header(tensor), data)
            found[values.key] = values
            refer(tensor, location=values.key)
        return found


def split(data: bytes | memoryview) -> Split:
    """Take the large weights out of a model file; nothing is copied but what remains."""
    try:
        graphs = [entry for entry in _fields(data, 0, len(data)) if entry.number == _GRAPH]
        if len(data) < LARGE or len(graphs) != 1:
            return Split(rest=bytes(data))
        graph = graphs[0]
        rest, weights = _without_weights(memoryview(data), graph)
    except _UnusualError:
        return Split(rest=bytes(data))
    outside = (data[: graph.start], tag_and_length(_GRAPH, len(rest)), rest, data[graph.end :])
    return Split(rest=b"".join(outside), weights=weights)


def _without_weights(data: memoryview, graph: _Field) -> tuple[bytes, dict[int, memoryview]]:
    """Return the content of a graph without its large weights, and these by the number of their initializer."""
    pieces: list[bytes | memoryview] = []
    weights: dict[int, memoryview] = {}
    count = 0
    for entry in _fields(data, graph.content, graph.end):
        weight = _weight(data, entry) if entry.number == _INITIALIZER else None
        if weight is None:
            pieces.append(data[entry.start : entry.end])
        else:
            weights[count] = data[weight.content : weight.end]
            before, after = data[entry.content : weight.start], data[weight.end : entry.end]
            pieces += [tag_and_length(_INITIALIZER, len(before) + len(after)), before, after]
        count += entry.number == _INITIALIZER
    return b"".join(pieces), weights


def _weight(data: memoryview, tensor: _Field) -> _Field | None:
    """Return the one large ``raw_data`` of an initializer, None without one."""
    if tensor.end - tensor.content < LARGE:
        return None
    found = [entry for entry in _fields(data, tensor.content, tensor.end) if entry.number == _RAW_DATA]
    return found[0] if len(found) == 1 and found[0].end - found[0].content >= LARGE else None


def _fields(data: bytes | memoryview, start: int, end: int) -> Iterator[_Field]:
    """Yield the fields of the message between two places.

    Raises:
        _UnusualError: It is none, or holds groups.
    """
    place = start
    while place < end:
        tag, content = _varint(data, place, end)
        kind = tag & 7
        if kind == _BYTES:
            length, content = _varint(data, content, end)
            after = content + length
        elif kind == _VARINT:
            after = _varint(data, content, end)[1]
        elif kind in _WIDTHS:
            after = content + _WIDTHS[kind]
        else:
            raise _UnusualError
        if after > end:
            raise _UnusualError
        yield _Field(tag >> 3, place, content, after)
        place = after


def _varint(data: bytes | memoryview, place: int, end: int) -> tuple[int, int]:
    """Return the number that begins at a place, and where it ends."""
    value = shift = 0
    while place < end and shift < 64:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
    raise _UnusualError
