"""Which file a weight may lie in, and how its bytes are read: never outside the model's folder, never as a whole.

The rule: after all symbolic links are followed, the data file must lie in the model's own folder or in the folder of
the model's real path. That lets the Hugging Face cache through, in which model and data are both links into a
``blobs`` folder, and nothing else that leaves the model's folder. Nothing is opened before the rule has been applied.

Source: ONNX, "External data"; its ``location``, ``offset`` and ``length`` entries.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from ...calibrate.errors import ModelError

CHUNK = 16 * 2**20
"""Bytes that are copied at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRange:
    """Bytes of a data file that has passed the path rules.

    Attributes:
        path: Real path of the file.
        offset: First byte.
        length: Number of bytes.
        identity: Device, inode and size when the rules were applied; the file is refused when it has changed since.
    """

    path: Path
    offset: int
    length: int
    identity: tuple[int, int, int]

    def map(self) -> memoryview:
        """Map the bytes into memory; only the pages that are touched are read.

        Raises:
            ModelError: The file was replaced since the path rules were applied.
        """
        if self.length == 0:
            return memoryview(b"")
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(self.path, flags)
        try:
            if _identity(os.fstat(descriptor)) != self.identity:
                raise ModelError("a data file changed while it was in use", where=str(self.path), do="run again")
            start = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
            skip = self.offset - start
            mapped = mmap.mmap(descriptor, skip + self.length, access=mmap.ACCESS_READ, offset=start)
        finally:
            os.close(descriptor)
        return memoryview(mapped)[skip:]

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in order, at most `CHUNK` of them mapped at a time."""
        for start in range(0, self.length, CHUNK):
            size = min(CHUNK, self.length - start)
            yield FileRange(path=self.path, offset=self.offset + start, length=size, identity=self.identity).map()


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """What a tensor says about its external data: ``location``, ``offset``, ``length`` (None: to the end)."""

    tensor: str
    location: str
    offset: int = 0
    length: int | None = None


class DataFolder:
    """The folder of one model, from which its weights may be read.

    Args:
        model: Path of the model file.
        allow_hardlinks: Accept a data file that has other names outside the folder.
    """

    def __init__(self, model: Path, *, allow_hardlinks: bool = False) -> None:
        absolute = Path(os.path.abspath(model))
        self.folder = absolute.parent
        self._homes = (Path(os.path.realpath(absolute.parent)), Path(os.path.realpath(absolute)).parent)
        self._allow_hardlinks = allow_hardlinks
        self._known: dict[str, tuple[Path, os.stat_result]] = {}

    def locate(self, place: Location, size: int) -> FileRange:
        """Apply the rules to one tensor of ``size`` bytes.

        Raises:
            ModelError: The location leaves the folder, is no plain file, is missing or too short, or has other names.
        """
        if place.location not in self._known:
            self._known[place.location] = self._admit(place)
        path, status = self._known[place.location]
        length = size if place.length is None else place.length
        if place.offset < 0 or length < 0 or place.offset + length > status.st_size or length != size:
            raise ModelError(
                f"the data of weight {place.tensor!r} does not fit its file",
                where=str(self.folder / place.location),
                found=f"offset {place.offset}, length {length}, file of {status.st_size} bytes",
                expected=f"{size} bytes for this weight, inside the file",
                do="fetch the data file again; it is probably cut off or belongs to another model",
            )
        return FileRange(path=path, offset=place.offset, length=length, identity=_identity(status))

    def _admit(self, place: Location) -> tuple[Path, os.stat_result]:
        location = place.location
        parts = PureWindowsPath(location).parts
        if not location or "\0" in location or os.path.isabs(location) or PureWindowsPath(location).anchor:
            raise self._outside(place, "an absolute or empty path")
        if ".." in parts:
            raise self._outside(place, "a path with '..'")
        real = Path(os.path.realpath(self.folder / location))
        if not any(real.is_relative_to(home) for home in self._homes):
            raise self._outside(place, f"a link to {real}")
        try:
            status = real.lstat()
        except FileNotFoundError:
            raise ModelError(
                f"the data file of weight {place.tensor!r} is missing",
                where=str(self.folder / location),
                do="put the data file beside the model; it is part of the model",
            ) from None
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"refused: weight {place.tensor!r} does not lie in a plain file", where=str(real))
        if status.st_nlink > 1 and not self._allow_hardlinks and _names_in(real.parent, status) < status.st_nlink:
            raise ModelError(
                f"refused: the data file of weight {place.tensor!r} has other names outside the model folder",
                where=str(real),
                found=f"{status.st_nlink} hard links",
                expected="1, or all of them in the model folder",
                do=f"cp --reflink=auto {real} {real}.copy && mv {real}.copy {real}",
            )
        return real, status

    def _outside(self, place: Location, found: str) -> ModelError:
        return ModelError(
            f"refused: weight {place.tensor!r} points outside the model folder ({place.location})",
            where=str(self.folder),
            found=found,
            expected="a file in the model folder",
            do="do not use this model unless you trust its origin; else export it again with its data beside it",
        )


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_size


def _names_in(folder: Path, status: os.stat_result) -> int:
    """Count the names that a file has in ``folder``."""
    with os.scandir(folder) as entries:
        return sum(entry.inode() == status.st_ino and entry.is_file(follow_symlinks=False) for entry in entries)
