"""Files that appear whole or not at all.

A target is written under a temporary name in its own folder, flushed to the disk and then renamed over, so a reader,
a full disk, Ctrl-C or ``kill -9`` sees either the old file or the complete new one. One writer at a time: a lock file
in the same folder names the process that holds it; the kernel drops the lock when that process ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import platform
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ..calibrate.errors import WriteError

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process, told apart from a later one with the same number by its start time.

    Attributes:
        host: Name of the machine.
        pid: Process number.
        start: Start time in clock ticks since the machine started, 0 when unknown.
        since: When it began to write, ISO 8601 in UTC.
    """

    host: str
    pid: int
    start: int
    since: str = ""

    @classmethod
    def this(cls) -> Process:
        """Return the running process."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return cls(host=_host(), pid=os.getpid(), start=_start_time(os.getpid()) or 0, since=now)

    def is_alive(self) -> bool:
        """Whether it still runs. A process of another machine counts as alive: nothing is known about it."""
        if self.host != _host():
            return True
        return _start_time(self.pid) == self.start


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _start_time(pid: int) -> int | None:
    """Return the start time of process ``pid`` in clock ticks since boot, None when there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    is_gone = fields[0] in "ZX"
    return None if is_gone else int(fields[19])


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
    if not target.parent.is_dir():
        raise WriteError("the folder to write into does not exist", where=str(target), do=f"mkdir -p {target.parent}")
    with writing(target), _locked(target):
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
        WriteError: An `OSError` that speaks of space, rights or the device was raised in the block.
    """
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0)
        elsewhere = error.filename is not None and Path(str(error.filename)).parent != target.parent
        if reason is None or elsewhere:
            raise
        raise WriteError(
            f"cannot write {target.name}: {reason}",
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


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    lock = target.parent / f"{_stem(target)}.lock"
    descriptor = _acquire(lock, target)
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(Process.this())).encode(), 0)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(lock: Path, target: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner, is_current = _owner(descriptor), _is_at(descriptor, lock)
            os.close(descriptor)
            if owner is None or owner.is_alive():
                raise _busy(target, owner) from None
            # The owner was killed, but a child of its own still holds the descriptor.
            if is_current:
                lock.unlink(missing_ok=True)
            continue
        if _is_at(descriptor, lock):
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether ``path`` is still the file that was opened as ``descriptor``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _owner(descriptor: int) -> Process | None:
    try:
        return Process(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _busy(target: Path, owner: Process | None) -> WriteError:
    who = f"pid {owner.pid} since {owner.since}" if owner else "another process"
    return WriteError(
        f"{target.name} is being written by {who}",
        where=str(target),
        do="wait until it has finished, or choose another name with -o",
    )
