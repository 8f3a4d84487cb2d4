"""Constants of a graph: where their values lie, how they are read, and how new ones are made.

graphsurgeon keeps a constant's values in an array or behind a `LazyValues`. Here every constant that comes from a file
or from `constant` holds a `Values`: a header (type, dimensions) and a source of bytes, read when somebody asks and
never kept. So a model may be larger than memory, and types that numpy does not have stay what they are.

Source: ONNX TensorProto: ``raw_data`` is little-endian, sub-byte elements packed from the low bits up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper
from onnx_graphsurgeon import Constant
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from ...calibrate.errors import ModelError
from .external import CHUNK, FileRange

Array = npt.NDArray[Any]

_KEYS = itertools.count(1)
_PACKED_BITS = {
    TensorProto.INT2: 2,
    TensorProto.UINT2: 2,
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
}
for _name in ("FLOAT6E2M3", "FLOAT6E3M2"):
    if hasattr(TensorProto, _name):
        _PACKED_BITS[getattr(TensorProto, _name)] = 6


def numpy_type(onnx_type: int) -> np.dtype[Any]:
    """Return the numpy (or ml_dtypes) type of unpacked elements of an ONNX type."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx_type))


def byte_size(onnx_type: int, dims: Iterable[int]) -> int:
    """Return how many bytes the packed elements of a tensor take."""
    count = math.prod(dims)
    bits = _PACKED_BITS.get(onnx_type) or numpy_type(onnx_type).itemsize * 8
    return (count * bits + 7) // 8


class Values(LazyValues):  # type: ignore[misc]
    """Values of a constant as a TensorProto holds them.

    Attributes:
        tensor: Type, dimensions, name and, in this base class, the data.
        shape: Dimensions.
        dtype: numpy or ml_dtypes type of the elements when unpacked.
        nbytes: Size of the packed data.
    """

    def __init__(self, tensor: TensorProto) -> None:
        self.tensor = tensor
        self.shape = tuple(tensor.dims)
        self.dtype = numpy_type(tensor.data_type)
        self.nbytes = byte_size(tensor.data_type, tensor.dims)

    def read(self) -> Array:
        """Return the unpacked values [shape]; read-only, a view of the source where the type allows it."""
        return numpy_helper.to_array(self.tensor)

    def chunks(self) -> Iterator[Any]:
        """Yield the packed bytes in order, as objects with the buffer interface."""
        yield self.tensor.raw_data if self.tensor.HasField("raw_data") else pack(self.read())

    def load(self) -> Array:
        """Return a copy of the values; what graphsurgeon calls when ``.values`` is touched."""
        return np.array(self.read())


class KeyedValues(Values):
    """Values outside of the TensorProto, which says so by an in-memory ``location`` of its own, ``#key``."""

    def __init__(self, tensor: TensorProto) -> None:
        super().__init__(header(tensor))
        self.key = f"#{next(_KEYS)}"


class FileValues(KeyedValues):
    """Values in an external data file, mapped into memory when read."""

    def __init__(self, tensor: TensorProto, source: FileRange) -> None:
        super().__init__(tensor)
        self.source = source

    def read(self) -> Array:
        """Return the values [shape], a read-only view of the mapped file unless the type is packed."""
        return unpack(self.source.map(), self.tensor)

    def chunks(self) -> Iterator[Any]:
        """Yield the bytes of the file, a few megabytes at a time."""
        return self.source.chunks()


class ComputedValues(KeyedValues):
    """Values that a function makes anew, block after block, each time they are read."""

    def __init__(self, tensor: TensorProto, blocks: Callable[[], Iterable[Array]]) -> None:
        super().__init__(tensor)
        self._blocks = blocks

    def read(self) -> Array:
        """Return all blocks in one array [shape]."""
        parts = [np.asarray(block, dtype=self.dtype).reshape(-1) for block in self._blocks()]
        return np.concatenate(parts or [np.empty(0, self.dtype)]).reshape(self.shape)

    def chunks(self) -> Iterator[Any]:
        """Yield the packed bytes of one block after the other."""
        return (pack(np.asarray(block, dtype=self.dtype)) for block in self._blocks())


def header(tensor: TensorProto) -> TensorProto:
    """Return a copy of ``tensor`` without its data: name, type, dimensions, documentation."""
    bare = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, doc_string=tensor.doc_string)
    bare.metadata_props.extend(tensor.metadata_props)
    return bare


def pack(array: Array) -> bytes:
    """Return the bytes that ``raw_data`` holds for unpacked elements."""
    return numpy_helper.from_array(array).raw_data


def unpack(data: Any, tensor: TensorProto) -> Array:
    """Return the elements [dims] that the packed bytes ``data`` stand for."""
    if tensor.data_type in _PACKED_BITS:
        filled = header(tensor)
        filled.raw_data = bytes(data)
        return numpy_helper.to_array(filled)
    return np.frombuffer(data, dtype=numpy_type(tensor.data_type)).reshape(tuple(tensor.dims))


def constant(name: str, array: npt.ArrayLike, onnx_type: str | int | None = None) -> Constant:
    """Make a constant of any ONNX type.

    Args:
        name: Name of the tensor.
        array: Unpacked values [shape]; of the type's own numpy or ml_dtypes type, or anything that casts to it.
        onnx_type: ``"INT4"``, ``"FLOAT8E4M3FN"``, ... (TensorProto.DataType); None takes the array's own type.

    Returns:
        A constant whose values are packed already; graphsurgeon passes it through as it is.
    """
    data = np.asarray(array)
    if onnx_type is not None:
        number = TensorProto.DataType.Value(onnx_type) if isinstance(onnx_type, str) else onnx_type
        data = data.astype(numpy_type(number), copy=False)
    tensor = numpy_helper.from_array(np.ascontiguousarray(data).reshape(data.shape), name)
    return Constant(name, Values(tensor))


def computed(name: str, shape: Iterable[int], onnx_type: str, blocks: Callable[[], Iterable[Array]]) -> Constant:
    """Make a constant whose values are made when the model is saved, and never all held.

    Args:
        name: Name of the tensor.
        shape: Dimensions.
        onnx_type: Name in TensorProto.DataType.
        blocks: Called for each reading; yields unpacked arrays that follow each other in row-major order. All but
            the last must fill whole bytes.
    """
    tensor = TensorProto(name=name, data_type=TensorProto.DataType.Value(onnx_type), dims=tuple(shape))
    return Constant(name, ComputedValues(tensor, blocks))


def values(tensor: Constant) -> Array:
    """Return a constant's values [shape], unpacked, without keeping them in the graph.

    External data comes as a read-only view of the mapped file: only what is touched is read.

    Raises:
        ModelError: The data file changed since the model was loaded.
    """
    stored = tensor._values
    if isinstance(stored, Values):
        return stored.read()
    if isinstance(stored, SparseValues):
        return densify(stored.tensor)
    return numpy_helper.to_array(stored.tensor) if isinstance(stored, LazyValues) else np.asarray(stored)


def densify(sparse: onnx.SparseTensorProto) -> Array:
    """Return the dense array [dims] of a sparse tensor (linear or coordinate indices)."""
    dense = np.zeros(tuple(sparse.dims), dtype=numpy_type(sparse.values.data_type))
    indices = numpy_helper.to_array(sparse.indices)
    flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), dense.shape)
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < dense.size:
        raise ModelError(f"sparse tensor {sparse.values.name!r} has indices outside its dimensions")
    dense.reshape(-1)[flat] = numpy_helper.to_array(sparse.values)
    return dense


def stored_size(tensor: Constant) -> int:
    """Return the bytes that a constant takes in a model file, without reading it."""
    stored = tensor._values
    if isinstance(stored, Values):
        return stored.nbytes
    if isinstance(stored, SparseValues):
        return int(stored.tensor.ByteSize())
    if isinstance(stored, LazyValues):
        return byte_size(stored.tensor.data_type, stored.tensor.dims)
    return byte_size(onnx_type_of(stored), stored.shape)


def onnx_type_of(array: Array) -> int:
    """Return the ONNX type number of an array's elements."""
    return int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))


__all__ = ["CHUNK", "ComputedValues", "FileValues", "KeyedValues", "Values", "computed", "constant", "values"]
