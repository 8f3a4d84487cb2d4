"""Which file a weight may lie in, and how its bytes are read: never outside the model's folder, never as a whole.

The rule: after all symbolic links are followed, the data file must lie in the model's own folder or in the folder of
the model's real path. That lets the Hugging Face cache through, in which model and data are both links into a
``blobs`` folder, and nothing else that leaves the model's folder. Nothing is opened before the rule has been applied.

Source: ONNX, "External data"; its ``location``, ``offset`` and ``length`` entries.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shlex
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from ...calibrate.errors import ModelError

CHUNK = 4 * 2**20
"""Bytes that are read at a time when a range is copied."""

_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRange:
    """Bytes of a data file that has passed the path rules.

    Attributes:
        path: Real path of the file.
        offset: First byte.
        length: Number of bytes.
        identity: Device, inode, size and time of change when the rules were applied; a file with others is refused.
    """

    path: Path
    offset: int
    length: int
    identity: tuple[int, int, int, int]

    def map(self, start: int = 0, length: int | None = None) -> memoryview:
        """Map ``length`` bytes (all when None) from ``start`` of the range; only pages that are touched are read.

        Raises:
            ModelError: The file was replaced since the path rules were applied.
        """
        size = self.length - start if length is None else length
        if size == 0:
            return memoryview(b"")
        first = self.offset + start
        skip = first % mmap.ALLOCATIONGRANULARITY
        with self._opened() as descriptor:
            mapped = mmap.mmap(descriptor, skip + size, access=mmap.ACCESS_READ, offset=first - skip)
        return memoryview(mapped)[skip:]

    def read(self, start: int, length: int) -> bytearray:
        """Return a copy of ``length`` bytes from ``start`` of the range.

        Raises:
            ModelError: The file was replaced or cut off since the path rules were applied.
        """
        data = bytearray(length)
        rest = memoryview(data)
        with self._opened() as descriptor:
            while rest:
                count = os.preadv(descriptor, [rest], self.offset + start + length - len(rest))
                if count == 0:
                    raise ModelError("a data file was cut off while it was in use", where=str(self.path))
                rest = rest[count:]
        return data

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            descriptor = os.open(self.path, _OPEN_FLAGS)
        except OSError as error:
            raise ModelError("a data file cannot be read", where=str(self.path), found=error.strerror) from error
        try:
            if _identity(os.fstat(descriptor)) != self.identity:
                raise ModelError("a data file changed while it was in use", where=str(self.path), do="run again")
            yield descriptor
        finally:
            os.close(descriptor)


class DataFolder:
    """The folder of one model, from which its weights may be read.

    Args:
        model: Path of the model file.
        allow_hardlinks: Accept a data file that has other names outside the folder.
    """

    def __init__(self, model: Path, *, allow_hardlinks: bool = False) -> None:
        self.folder = model.absolute().parent
        self._homes = (self.folder.resolve(), model.resolve().parent)
        self._allow_hardlinks = allow_hardlinks
        self._known: dict[str, tuple[Path, os.stat_result]] = {}

    def locate(self, tensor: str, entries: Mapping[str, str], size: int) -> FileRange:
        """Apply the rules to one tensor.

        Args:
            tensor: Its name, for messages.
            entries: Its ``external_data``: ``location``, ``offset`` (0 when absent), ``length`` (``size`` when absent).
            size: Bytes that its type and dimensions ask for.

        Raises:
            ModelError: The location leaves the folder, is no plain file, is missing or too short, or has other names.
        """
        location = entries.get("location", "")
        if location not in self._known:
            self._known[location] = self._admit(tensor, location)
        path, status = self._known[location]
        try:
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
        except ValueError as error:
            raise ModelError(f"weight {tensor!r} has no readable offset or length", found=str(error)) from error
        if offset < 0 or length != size or offset + length > status.st_size:
            raise ModelError(
                f"the data of weight {tensor!r} does not fit its file",
                where=str(self.folder / location),
                found=f"offset {offset}, length {length}, file of {status.st_size} bytes",
                expected=f"length {size} (what its dimensions ask for), inside the file",
                do="fetch the data file again; it is cut off, or belongs to another model",
            )
        return FileRange(path=path, offset=offset, length=length, identity=_identity(status))

    def _admit(self, tensor: str, location: str) -> tuple[Path, os.stat_result]:
        windows = PureWindowsPath(location)
        if not location or "\0" in location or Path(location).is_absolute() or windows.anchor:
            raise self._outside(tensor, location, "an absolute path" if location else "an empty path")
        if ".." in windows.parts:
            raise self._outside(tensor, location, "a path with '..'")
        try:
            real = (self.folder / location).resolve()
            if not any(real.is_relative_to(home) for home in self._homes):
                raise self._outside(tensor, location, f"a link to {real}")
            status = real.lstat()
        except (OSError, RuntimeError) as error:  # missing, no permission, a loop of links, a name too long
            raise ModelError(
                f"the data file of weight {tensor!r} is missing or cannot be reached",
                where=str(self.folder / location),
                found=getattr(error, "strerror", None) or str(error),
                do="put the data file beside the model; it is part of the model",
            ) from error
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(
                f"refused: the data of weight {tensor!r} does not lie in a plain file",
                where=str(real),
                expected="a plain file in the model folder",
            )
        self._refuse_other_names(tensor, real, status)
        return real, status

    def _refuse_other_names(self, tensor: str, real: Path, status: os.stat_result) -> None:
        if status.st_nlink == 1 or self._allow_hardlinks or _names_in(real.parent, status) == status.st_nlink:
            return
        copy = shlex.quote(f"{real}.copy")
        raise ModelError(
            f"refused: the data file of weight {tensor!r} has other names (hard links) outside the model folder",
            where=str(real),
            found=f"{status.st_nlink} hard links",
            expected="all of its names in the model folder, or --allow-hardlinks",
            do=f"cp --reflink=auto {shlex.quote(str(real))} {copy} && mv {copy} {shlex.quote(str(real))}",
        )

    def _outside(self, tensor: str, location: str, found: str) -> ModelError:
        return ModelError(
            f"refused: weight {tensor!r} points outside the model folder ({location})",
            where=str(self.folder),
            found=found,
            expected="a file in the model folder",
            do="do not use this model unless you trust its origin; else export it again with its data beside it",
        )


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _names_in(folder: Path, status: os.stat_result) -> int:
    """Count the names that a file has in ``folder``."""
    with os.scandir(folder) as entries:
        return sum(entry.inode() == status.st_ino and entry.is_file(follow_symlinks=False) for entry in entries)
