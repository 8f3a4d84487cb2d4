"""Constants of a graph: where their values lie, how they are read, and how new ones are made.

graphsurgeon keeps a constant's values in an array or behind a `LazyValues`. Here every constant that comes from a file
or from `constant` holds a `Values`: a header (type, dimensions) and a source of bytes, read when somebody asks and
never kept. So a model may be larger than memory, and types that numpy does not have stay what they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper
from onnx_graphsurgeon import Constant
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from ...calibrate.errors import ModelError
from .external import CHUNK, FileRange
from .halves import widened
from .lazy import Lazy, Reader, Region, piece
from .protos import Array, byte_size, header, is_packed, numpy_type, onnx_type_of, pack, unpack
from .scratch import LARGE, keep

Job = Callable[[], Any]
"""Makes some bytes, as an object with the buffer interface, in whatever thread it is called."""

_KEYS = itertools.count(1)
_WINDOW = 2**25
"""Bytes of a file that are mapped at a time where a region is scattered over it."""


class Values(LazyValues):  # type: ignore[misc]
    """Values of a constant as a TensorProto holds them.

    Attributes:
        tensor: Type, dimensions, name and, in this base class, the data.
        shape: Dimensions.
        dtype: numpy or ml_dtypes type of the elements when unpacked.
        nbytes: Size of the packed data.
        takes_work: Whether the bytes are read or made by the `jobs`, which then are worth a thread.
    """

    takes_work: ClassVar[bool] = False

    def __init__(self, tensor: TensorProto) -> None:
        self.tensor = tensor
        self.shape = tuple(tensor.dims)
        self.dtype = numpy_type(tensor.data_type)
        self.nbytes = byte_size(tensor.data_type, tensor.dims)

    def read(self) -> Array:
        """Return the unpacked values [shape]; read-only, a view of the source where the type allows it."""
        try:
            return numpy_helper.to_array(self.tensor)
        except ValueError as error:
            raise ModelError(f"tensor {self.tensor.name!r} cannot be read", found=str(error)) from error

    def jobs(self) -> Iterator[Job]:
        """Yield functions that give the packed bytes, which follow each other in this order."""
        yield lambda: self.tensor.raw_data if self.tensor.HasField("raw_data") else pack(self.read())

    def chunks(self) -> Iterator[Any]:
        """Yield the packed bytes in order, a few megabytes at a time where they are not in memory anyway."""
        return (job() for job in self.jobs())

    def open(self) -> Reader:
        """Return a function that reads regions, for one pass; here the values are unpacked once and held by it."""
        array = self.read()
        return lambda region: array[region]

    def load(self) -> Array:
        """Return a copy of the values; what graphsurgeon calls when ``.values`` is touched."""
        return np.array(self.read())


class KeyedValues(Values):
    """Values outside of the TensorProto.

    Attributes:
        key: What stands for them in a TensorProto, as an in-memory ``location``: ``#`` and a number of their own.
    """

    def __init__(self, tensor: TensorProto) -> None:
        super().__init__(header(tensor))
        self.key = f"#{next(_KEYS)}"


class FileValues(KeyedValues):
    """Values in an external data file, mapped into memory when read.

    Attributes:
        source: Where they lie.
    """

    takes_work = True

    def __init__(self, tensor: TensorProto, source: FileRange) -> None:
        super().__init__(tensor)
        self.source = source

    def read(self) -> Array:
        """Return the values [shape], a read-only view of the mapped file unless the type is packed."""
        return unpack(self.source.map(), self.tensor)

    def open(self, shape: tuple[int, ...] | None = None) -> Reader:
        """Return a function that reads regions of the values, seen in another ``shape`` if one is given.

        A region that lies in one piece of the file is read into memory of its own, one that does not is gathered from
        windows of the file; nothing is held.
        """
        if is_packed(self.tensor.data_type):
            array = self.read().reshape(shape or self.shape)
            return lambda region: array[region]
        return partial(self._region, shape or self.shape)

    def _region(self, shape: tuple[int, ...], region: Region) -> Array:
        sizes, width = [part.stop - part.start for part in region], self.dtype.itemsize
        place = piece(shape, region)
        if place is not None:
            first, count = place
            return np.frombuffer(self.source.read(first * width, count * width), self.dtype).reshape(sizes)
        axis = next(axis for axis, size in enumerate(sizes) if size > 1)
        step = max(1, _WINDOW // (width * int(np.prod(shape[axis + 1 :]))))
        result = np.empty(sizes, self.dtype)
        for start in range(0, sizes[axis], step):
            stop = min(start + step, sizes[axis])
            window = slice(region[axis].start + start, region[axis].start + stop)
            # Mapped anew for each window: what is no longer mapped takes no memory.
            values = self.read().reshape(shape)[(*region[:axis], window, *region[axis + 1 :])]
            result[(slice(None),) * axis + (slice(start, stop),)] = values
        return result

    def jobs(self) -> Iterator[Job]:
        """Yield functions that read the bytes of the file, a few megabytes each."""
        for start in range(0, self.source.length, CHUNK):
            yield partial(self.source.read, start, min(CHUNK, self.source.length - start))


class EmbeddedValues(KeyedValues):
    """Values that lie somewhere in the bytes of a model file, which are in memory or mapped."""

    def __init__(self, tensor: TensorProto, data: memoryview) -> None:
        super().__init__(tensor)
        self._data = data

    def read(self) -> Array:
        """Return the values [shape], a read-only view unless the type is packed."""
        return unpack(self._data, self.tensor)

    def jobs(self) -> Iterator[Job]:
        """Yield functions that give the bytes, a few megabytes each."""
        for start in range(0, len(self._data), CHUNK):
            yield partial(self._data.__getitem__, slice(start, start + CHUNK))


class PackedValues(KeyedValues):
    """Values that were packed already, and are kept in memory or in the scratch file."""

    def __init__(self, tensor: TensorProto, packed: Array) -> None:
        super().__init__(tensor)
        self._packed = keep(packed)

    def read(self) -> Array:
        """Return the values [shape], a read-only view unless the type is packed."""
        return unpack(self._packed, self.tensor)

    def jobs(self) -> Iterator[Job]:
        """Yield functions that give the bytes, a few megabytes each."""
        for start in range(0, len(self._packed), CHUNK):
            yield partial(self._packed.__getitem__, slice(start, start + CHUNK))


class ComputedValues(KeyedValues):
    """Values that are made anew, region after region, each time they are read."""

    takes_work = True

    def __init__(self, tensor: TensorProto, source: Lazy) -> None:
        super().__init__(tensor)
        self._source = source

    def open(self) -> Reader:
        """Return a function that makes regions."""
        return self._source.open()

    def read(self) -> Array:
        """Return all of them in one array [shape]."""
        return np.asarray(self._source, dtype=self.dtype)

    def jobs(self) -> Iterator[Job]:
        """Yield functions that make the packed bytes of one region each."""
        for job in self._source.jobs():
            yield partial(lambda job: pack(np.asarray(job(), dtype=self.dtype)), job)


def constant(name: str, array: npt.ArrayLike | Lazy, onnx_type: str | int | None = None) -> Constant:
    """Make a constant of any ONNX type.

    Args:
        name: Name of the tensor.
        array: Unpacked values [shape]; of the type's own numpy or ml_dtypes type, or anything that casts to it. A lazy
            array is made when the model is saved; another large one is kept in the scratch file, not in memory.
        onnx_type: ``"INT4"``, ``"FLOAT8E4M3FN"``, ... (TensorProto.DataType); None takes the array's own type.

    Returns:
        A constant whose values are packed already; graphsurgeon passes it through as it is.
    """
    if isinstance(array, Lazy):
        number = onnx_type_of(array.dtype) if onnx_type is None else _type_number(onnx_type)
        tensor = TensorProto(name=name, data_type=number, dims=array.shape)
        return Constant(name, ComputedValues(tensor, array))
    data = np.asarray(array)
    number = _type_number(onnx_type) if onnx_type is not None else None
    if number is not None:
        data = data.astype(numpy_type(number), copy=False)
    if data.nbytes < LARGE or data.dtype.kind in "OSU":
        return Constant(name, Values(numpy_helper.from_array(data, name)))
    tensor = TensorProto(name=name, data_type=number or onnx_type_of(data.dtype), dims=data.shape)
    return Constant(name, PackedValues(tensor, pack(data)))


def recast(name: str, tensor: Constant, onnx_type: str | int) -> Constant:
    """Make a constant with the values of another one in another type, cast region by region when they are read.

    Args:
        name: Name of the new tensor.
        tensor: Where the values lie.
        onnx_type: Name in TensorProto.DataType, or its number.
    """
    held, dtype = stored(tensor), numpy_type(_type_number(onnx_type))

    def opener() -> Reader:
        reader = held.open()
        return lambda region: _cast(reader(region), dtype)

    return constant(name, Lazy(held.shape, dtype, opener), onnx_type)


def _cast(array: Array, dtype: np.dtype[Any]) -> Array:
    if dtype == np.float32:
        return widened(array)
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def _type_number(onnx_type: str | int) -> int:
    return int(TensorProto.DataType.Value(onnx_type)) if isinstance(onnx_type, str) else onnx_type


def stored(tensor: Constant) -> Values:
    """Return the `Values` of a constant, wrapping what it holds if need be; the constant stays as it is.

    Raises:
        TypeError: It is a sparse constant.
    """
    held = tensor._values
    if isinstance(held, Values):
        return held
    if isinstance(held, SparseValues):
        raise TypeError(f"constant {tensor.name!r} is sparse")
    if isinstance(held, LazyValues):
        return Values(held.tensor)
    return Values(numpy_helper.from_array(np.asarray(held), tensor.name))


def values(tensor: Constant) -> Array:
    """Return a constant's values [shape], unpacked, without keeping them in the graph.

    External data comes as a read-only view of the mapped file: only what is touched is read.

    Raises:
        ModelError: The data file changed since the model was loaded, or a sparse constant is damaged.
    """
    held = tensor._values
    if isinstance(held, SparseValues):
        return densify(held.tensor)
    return np.asarray(held) if isinstance(held, np.ndarray) else stored(tensor).read()


def densify(sparse: onnx.SparseTensorProto) -> Array:
    """Return the dense array [dims] of a sparse tensor (linear or coordinate indices).

    Raises:
        ModelError: Indices lie outside the dimensions, or the data is external.
    """
    name = sparse.values.name
    if TensorProto.EXTERNAL in (sparse.values.data_location, sparse.indices.data_location):
        raise ModelError(f"sparse tensor {name!r} has external data", expected="data inside the model file")
    dense = np.zeros(tuple(sparse.dims), dtype=numpy_type(sparse.values.data_type))
    indices = numpy_helper.to_array(sparse.indices)
    try:
        flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), dense.shape)
        dense.reshape(-1)[flat] = numpy_helper.to_array(sparse.values)
    except (ValueError, IndexError) as error:
        raise ModelError(f"sparse tensor {name!r} has indices outside its dimensions", found=str(error)) from error
    return dense


def stored_size(tensor: Constant) -> int:
    """Return the bytes that a constant takes in a model file, without reading it."""
    held = tensor._values
    if isinstance(held, SparseValues):
        return int(held.tensor.ByteSize())
    if isinstance(held, np.ndarray):
        return byte_size(onnx_type_of(held.dtype), held.shape)
    return stored(tensor).nbytes
