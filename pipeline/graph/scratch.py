"""A place for large arrays that are needed later: a temporary file, so that the memory they take can be reclaimed.

The file has no name, so that nothing is left of it whatever happens to the process; it lies where ``TMPDIR`` says.
Mapped model files stand beside it: what is mapped can be let go and is read again when it is needed.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from ...calibrate.errors import WriteError

Array = npt.NDArray[Any]

LARGE = 2**16
"""Arrays of fewer bytes stay in memory."""

_SEGMENT = 2**28
_MANY = 2**20
_PAGE = mmap.ALLOCATIONGRANULARITY
_lock = threading.Lock()
_held = [0]
_maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


class _Segment:
    """A stretch of scratch space; it is given back to the file system with the last array that lies in it."""

    def __init__(self, size: int) -> None:
        self.file = tempfile.TemporaryFile(prefix="qpipe-", buffering=0)  # noqa: SIM115 - it lives as long as the segment
        self.file.truncate(size)
        self.map = mapped(self.file.fileno(), size)
        self.left = size

    def put(self, array: Array) -> Array:
        start = len(self.map) - self.left
        data, place = memoryview(array.reshape(-1).view(np.uint8)), start
        while data:
            # Written, not stored through the map: a full disk is then an error and not a signal.
            written = os.pwrite(self.file.fileno(), data, place)
            data, place = data[written:], place + written
        self.left -= -(-array.nbytes // _PAGE) * _PAGE
        return np.frombuffer(self.map, array.dtype, array.size, start).reshape(array.shape)


_current: list[_Segment] = []
os.register_at_fork(after_in_child=_current.clear)  # two processes must not write to the same place


def keep(array: Array) -> Array:
    """Return a read-only array of the same values; a large one lies in the scratch file from then on.

    Raises:
        WriteError: The scratch file cannot be written.
    """
    whole = np.ascontiguousarray(array).reshape(array.shape)
    if whole.nbytes < LARGE:
        whole = whole.view()
        whole.flags.writeable = False
        return whole
    try:
        with _lock:
            release(whole.nbytes)
            if not _current or _current[0].left < whole.nbytes:
                _current[:] = [_Segment(max(_SEGMENT, -(-whole.nbytes // _PAGE) * _PAGE))]
            return _current[0].put(whole)
    except OSError as error:
        raise WriteError(
            "cannot write the scratch file",
            where=tempfile.gettempdir(),
            found=error.strerror,
            do="free some space there, or set TMPDIR to a folder on a disk with more",
        ) from error


def mapped(descriptor: int, size: int) -> mmap.mmap:
    """Map a file for reading; `release` lets go of what was read of it."""
    found = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    _maps.add(found)
    return found


def release(read: int) -> None:
    """Let go of the memory that mapped files take at the moment; they are read again when they are needed.

    Args:
        read: Bytes of them that may have been read since the last call; little is done until they have become many.
    """
    _held[0] += read
    if _held[0] >= _MANY:
        _held[0] = 0
        for found in list(_maps):
            found.madvise(mmap.MADV_DONTNEED)
