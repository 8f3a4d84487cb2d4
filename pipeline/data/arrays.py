"""Arrays in ``.npy`` and ``.npz`` files, read a few samples at a time.

The header of every array is read and compared with the bytes that are there before anything is allocated, so a file
that declares more than it holds is refused; arrays of Python objects (pickles) are refused always.

Source: numpy.lib.format, the NPY format 1.0 to 3.0; a ``.npz`` file is a zip archive of such files.
"""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ...calibrate.errors import DataError

Array = npt.NDArray[Any]

MAX_PIECE = 4 * 2**30
"""Bytes of one array that are held at a time at most: a batch, or a whole array in Fortran order."""


class ArrayStream:
    """One array of a file, read forwards along its first axis.

    Args:
        file: Positioned at the start of the array; read only forwards.
        available: Bytes that the file holds from there, header included.
        where: What to call it in messages.

    Attributes:
        shape: Dimensions.
        dtype: Type of the elements.

    Raises:
        DataError: It is no array, holds Python objects, or declares another size than it has.
    """

    def __init__(self, file: IO[bytes], available: int, where: str) -> None:
        self._file = file
        self._where = where
        self.shape, fortran, self.dtype, header = _read_header(file, where)
        size = math.prod(self.shape) * self.dtype.itemsize
        if size != available - header:
            raise DataError(
                "an array declares another size than its file has",
                where=where,
                found=f"{available - header} bytes",
                expected=f"{size} bytes for {self.dtype}{list(self.shape)}",
                do="write the file again; it is cut off or was tampered with",
            )
        self._whole = self._read(self.shape, "F") if fortran and len(self.shape) > 1 else None
        self._next = 0

    def take(self, count: int) -> Array:
        """Return the next ``count`` samples [count, ...]; a scalar is returned whole each time."""
        if not self.shape:
            if self._whole is None:
                self._whole = self._read((), "C")
            return self._whole
        start, self._next = self._next, self._next + count
        if self._whole is not None:
            return np.ascontiguousarray(self._whole[start : self._next])
        return self._read((count, *self.shape[1:]), "C")

    def _read(self, shape: tuple[int, ...], order: str) -> Array:
        size = math.prod(shape) * self.dtype.itemsize
        if size > MAX_PIECE:
            raise DataError(
                "one batch of this array does not fit into memory",
                where=self._where,
                found=f"{size} bytes for {self.dtype}{list(shape)}",
                expected=f"at most {MAX_PIECE} bytes",
                do="use a smaller --batch, and save the array in C order (numpy.ascontiguousarray)",
            )
        data = self._file.read(size)
        if len(data) != size:
            raise DataError("an array ends early", where=self._where, found=f"{len(data)} of {size} bytes")
        flat = np.frombuffer(data, dtype=self.dtype)
        return flat.reshape(shape, order="F" if order == "F" else "C")


def _read_header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return shape, Fortran order, type and length of the header."""
    start = file.read(6)
    if start[:1] == b"\x80":
        raise DataError("this file holds pickled Python objects; refused", where=where, do=_resave())
    if start != b"\x93NUMPY":
        raise DataError("this is no numpy array", where=where, found=f"bytes {start!r}", expected="an .npy file")
    version = tuple(file.read(2))
    counter = _Counter(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
        # Version 3 differs from 2 in the encoding of field names only.
        (3, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise DataError("unknown version of the .npy format", where=where, found=str(version), expected="1 to 3")
    try:
        shape, fortran, dtype = readers[version](counter)  # type: ignore[arg-type]
    except (ValueError, TypeError, SyntaxError) as error:
        raise DataError("the header of this array is damaged", where=where, found=str(error)) from error
    if dtype.hasobject:
        raise DataError("this array holds Python objects; refused", where=where, found=str(dtype), do=_resave())
    if any(size < 0 for size in shape):
        raise DataError("this array has a negative size", where=where, found=str(shape))
    return shape, fortran, dtype, 8 + counter.count


def _resave() -> str:
    return "save plain numbers: numpy.save(file, array, allow_pickle=False)"


class _Counter:
    """Counts the bytes that are read through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.count = 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.count += len(data)
        return data


def read_npy(path: Path, name: str, batch: int) -> Iterator[dict[str, Array]]:
    """Yield the array of a ``.npy`` file in pieces of ``batch`` samples, under ``name``."""
    with path.open("rb") as file:
        yield from _pieces({name: ArrayStream(file, os.fstat(file.fileno()).st_size, str(path))}, batch, str(path))


def read_columns(paths: dict[str, Path], batch: int) -> Iterator[dict[str, Array]]:
    """Yield the arrays of several ``.npy`` files, one per input, side by side in pieces of ``batch`` samples."""
    with contextlib.ExitStack() as stack:
        streams = {}
        for name, path in paths.items():
            file = stack.enter_context(path.open("rb"))
            streams[name] = ArrayStream(file, os.fstat(file.fileno()).st_size, str(path))
        yield from _pieces(streams, batch, str(next(iter(paths.values())).parent))


def read_npz(path: Path, batch: int) -> Iterator[dict[str, Array]]:
    """Yield the arrays of a ``.npz`` file side by side, in pieces of ``batch`` samples.

    Raises:
        DataError: The archive is damaged, holds something else than arrays, or as in `ArrayStream`.
    """
    try:
        with zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
            streams = {}
            for member in archive.infolist():
                where = f"{path}, {member.filename}"
                if not member.filename.endswith(".npy"):
                    raise DataError("this archive holds something that is no array", where=where)
                file = stack.enter_context(archive.open(member))
                streams[member.filename.removesuffix(".npy")] = ArrayStream(file, member.file_size, where)
            if not streams:
                raise DataError("this archive is empty", where=str(path))
            yield from _pieces(streams, batch, str(path))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError("this .npz archive is damaged", where=str(path), found=str(error)) from error


def count_samples(path: Path) -> int | None:
    """Return how many samples a ``.npy`` or ``.npz`` file declares; None when it cannot be told or is damaged."""
    shapes = []
    with contextlib.suppress(DataError, OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error):
        if path.suffix == ".npy":
            with path.open("rb") as file:
                shapes.append(_read_header(file, str(path))[0])
        elif path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    with archive.open(member) as file:
                        shapes.append(_read_header(file, member.filename)[0])
    return next((shape[0] for shape in shapes if shape), None)


def _pieces(streams: dict[str, ArrayStream], batch: int, where: str) -> Iterator[dict[str, Array]]:
    counts = {name: stream.shape[0] for name, stream in streams.items() if stream.shape}
    if len(set(counts.values())) > 1:
        raise DataError(
            "the arrays of this file have different numbers of samples",
            where=where,
            found=", ".join(f"{name}: {count}" for name, count in counts.items()),
            expected="the same size on the first axis",
        )
    total = next(iter(counts.values()), 1)
    for start in range(0, total, batch):
        count = min(batch, total - start)
        yield {name: stream.take(count) for name, stream in streams.items()}
