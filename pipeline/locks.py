"""One writer at a time: a lock file that names the process that holds it.

The kernel drops the lock when that process ends, so a killed writer blocks nobody. Where a child that it left behind
still holds the lock, the process number and start time in the file tell that the owner is gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ..calibrate.errors import WriteError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""File systems without locks say this; there the process number in the file must do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process, told apart from a later one with the same number by its start time.

    Attributes:
        host: Hash of the names of the machine and of the container.
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
    # Process numbers mean something inside one machine and one container only.
    space = Path("/proc/self/ns/pid")
    name = platform.node() + (str(space.readlink()) if space.is_symlink() else "")
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _start_time(pid: int) -> int | None:
    """Return the start time of process ``pid`` in clock ticks since boot, None when there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    is_gone = fields[0] in "ZX"
    return None if is_gone else int(fields[19])


@contextlib.contextmanager
def locked(target: Path, lock: Path) -> Iterator[None]:
    """Hold the only right to write ``target`` while the block runs, by means of the file ``lock``.

    Raises:
        WriteError: Another process, or another thread, holds it; says which and since when.
    """
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
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            owner = _owner(descriptor)
            if owner is not None and owner.is_alive():
                os.close(descriptor)
                raise _busy(target, owner) from None
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
