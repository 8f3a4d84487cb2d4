"""Files that appear whole or not at all.

A target is written under a temporary name in its own folder, flushed to the disk and then renamed over, so a reader,
a full disk, Ctrl-C or ``kill -9`` sees either the old file or the complete new one. One writer at a time; what a killed
one left is cleared away by the next.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import shlex
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from ..calibrate.errors import WriteError
from .locks import Process, locked

_SERIAL = itertools.count()
_PREFIX = ".qpipe-"
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the file size limit",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write in this folder",
    errno.EPERM: "no permission to write in this folder",
    errno.EIO: "the device reports an input/output error",
    errno.ENAMETOOLONG: "the file name is too long",
}


@contextlib.contextmanager
def replace_file(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; on success put that file in the place of ``path``.

    When the block raises, the temporary file is removed and ``path`` stays what it was.

    Args:
        path: The target. A symbolic link is replaced itself, the file it points to is left alone.
        force: Replace an existing file.

    Yields:
        A path in the target's folder at which nothing exists yet.

    Raises:
        WriteError: The target exists (without ``force``), is not a plain file, is being written by another process,
            or the file system refuses.
    """
    target = Path(path)
    with claim(target, force=force), temporary(target) as tmp:
        yield tmp
        put(tmp, target)


@contextlib.contextmanager
def claim(target: Path, *, force: bool = False) -> Iterator[None]:
    """Hold the only right to write ``target`` while the block runs.

    Raises:
        WriteError: As in `replace_file`.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(writing(target))
        if not target.parent.is_dir():
            remedy = f"mkdir -p {shlex.quote(str(target.parent))}"
            raise WriteError("the folder to write into does not exist", where=str(target), do=remedy)
        stack.enter_context(locked(target, target.parent / f"{_stem(target)}.lock"))
        _refuse_existing(target, force)
        _remove_stale(target)
        yield


@contextlib.contextmanager
def temporary(target: Path) -> Iterator[Path]:
    """Yield a fresh name beside ``target``; whatever lies there when the block ends is removed."""
    me = Process.this()
    tmp = target.parent / f"{_stem(target)}-{me.host}-{me.pid}-{me.start}-{next(_SERIAL)}.tmp"
    try:
        yield tmp
    finally:
        tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn what the file system refuses while ``target`` is written into a `WriteError`.

    Raises:
        WriteError: An `OSError` about a file beside the target, or about space, rights or the device, was raised.
    """
    try:
        yield
    except OSError as error:
        named = None if error.filename is None else Path(str(error.filename)).parent
        if (named is None and error.errno not in _REASONS) or named not in (None, target.parent):
            raise
        raise WriteError(
            f"cannot write {target.name}: {_REASONS.get(error.errno or 0, error.strerror)}",
            where=str(target),
            found=error.strerror,
            do="choose another folder with -o, or free what is in the way; nothing was left at the target",
        ) from error


def put(tmp: Path, target: Path) -> None:
    """Flush a finished temporary file and rename it over ``target``, in one step and for good."""
    _sync(tmp)
    tmp.replace(target)
    _sync(target.parent)


def require_space(target: Path, size: int) -> None:
    """Fail early when ``size`` bytes cannot fit beside ``target``.

    Raises:
        WriteError: The file system has less free space.
    """
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise WriteError(
            f"cannot write {target.name}: the disk is full",
            where=str(target),
            found=f"{free} bytes free",
            expected=f"{size} bytes",
            do="choose a folder on another disk with -o, or free some space",
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_existing(target: Path, force: bool) -> None:
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise WriteError(f"the target is {kind}", where=str(target), expected="a file name that is free")
    if not force:
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "a file"
        raise WriteError(
            "the target exists already",
            where=str(target),
            found=kind,
            do="give --force to replace it, or another name with -o",
        )


def _stem(target: Path) -> str:
    return _PREFIX + hashlib.sha256(target.name.encode()).hexdigest()[:12]


def _remove_stale(target: Path) -> None:
    """Remove the temporary files that killed runs left beside ``target``."""
    for leftover in target.parent.glob(f"{_stem(target)}-*.tmp"):
        host, pid, start, _ = leftover.stem.removeprefix(f"{_stem(target)}-").split("-")
        if not Process(host=host, pid=int(pid), start=int(start)).is_alive():
            leftover.unlink(missing_ok=True)
