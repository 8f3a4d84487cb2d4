"""Targets are old or complete, one writer at a time, and killed runs leave nothing that stays."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from qpipe.calibrate.errors import WriteError
from qpipe.pipeline import files
from qpipe.pipeline.files import replace_file
from qpipe.pipeline.locks import Process


def in_child(action: Callable[[], None]) -> int:
    """Run ``action`` in a forked child; return its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            action()
            status = 0
        except WriteError as error:
            status = error.exit_code
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    with replace_file(target) as tmp:
        assert tmp.parent == tmp_path
        tmp.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(tmp_path) == ["a.json"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")

    def fail() -> None:
        with replace_file(target, force=True) as tmp:
            tmp.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_an_existing_file_needs_force(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(WriteError, match="exists already") as info, replace_file(target):
        pytest.fail("the block must not run")
    assert info.value.exit_code == 6
    assert "--force" in str(info.value)
    with replace_file(target, force=True) as tmp:
        tmp.write_text("new")
    assert target.read_text() == "new"


def test_a_symbolic_link_is_replaced_itself_and_only_with_force(tmp_path: Path) -> None:
    real, link, dangling = tmp_path / "real", tmp_path / "link", tmp_path / "dangling"
    real.write_text("precious")
    link.symlink_to(real)
    dangling.symlink_to(tmp_path / "nowhere")
    for target in (link, dangling):
        with pytest.raises(WriteError, match="exists already"), replace_file(target):
            pass
        with replace_file(target, force=True) as tmp:
            tmp.write_text("new")
        assert not target.is_symlink()
        assert target.read_text() == "new"
    assert real.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_what_is_no_file_is_never_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "x"
    target.mkdir() if kind == "folder" else os.mkfifo(target)
    with pytest.raises(WriteError, match=r"a folder|a device, pipe or socket"), replace_file(target, force=True):
        pass
    assert names(tmp_path) == ["x"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="does not exist") as info, replace_file(tmp_path / "no" / "a"):
        pass
    assert info.value.do == f"mkdir -p {tmp_path / 'no'}"


def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o755)

    def attempt() -> None:
        os.chdir(folder)
        if os.getuid() == 0:
            os.setuid(65534)
        else:
            folder.chmod(0o555)
        with replace_file("a"):
            pass

    assert in_child(attempt) == WriteError.exit_code
    folder.chmod(0o755)
    assert names(folder) == []


def test_errors_that_are_not_about_the_target_pass_through(tmp_path: Path) -> None:
    def read_something_else() -> None:
        with replace_file(tmp_path / "a"):
            raise PermissionError(errno.EACCES, "denied", "/elsewhere/input.bin")

    with pytest.raises(PermissionError):
        read_something_else()
    assert names(tmp_path) == []


def test_anything_that_goes_wrong_beside_the_target_is_a_write_error(tmp_path: Path) -> None:
    (tmp_path / f"{files._stem(tmp_path / 'a')}.lock").symlink_to("elsewhere")
    with pytest.raises(WriteError, match="Too many levels of symbolic links"), replace_file(tmp_path / "a"):
        pytest.fail("a planted link must not be followed")
    with pytest.raises(WriteError, match="Not a directory"), replace_file(tmp_path / "b") as tmp:
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(tmp))


def test_a_file_system_without_locks_still_tells_writers_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    first = Writer(tmp_path / "a")
    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(WriteError, match=f"by pid {first.pid} "), replace_file(tmp_path / "a"):
        pass
    first.kill()
    with replace_file(tmp_path / "a") as tmp:
        tmp.write_text("new")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO])
def test_what_the_device_refuses_becomes_a_write_error(tmp_path: Path, code: int) -> None:
    def write() -> None:
        with replace_file(tmp_path / "a") as tmp:
            tmp.write_text("half")
            raise OSError(code, os.strerror(code))

    with pytest.raises(WriteError, match="cannot write a: ") as info:
        write()
    assert info.value.found == os.strerror(code)
    assert names(tmp_path) == []


@pytest.mark.parametrize("limit", [0, 1, 100, 4095, 4096, 9999])
def test_a_file_size_limit_leaves_the_old_file(tmp_path: Path, limit: int) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with replace_file(target, force=True) as tmp:
            tmp.write_bytes(bytes(10000))

    assert in_child(write) == WriteError.exit_code
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_too_little_space_is_seen_before_writing(tmp_path: Path) -> None:
    files.require_space(tmp_path / "a", 1)
    with pytest.raises(WriteError, match="the disk is full"):
        files.require_space(tmp_path / "a", 2**60)


class Writer:
    """A child process that holds a target open for writing."""

    def __init__(self, target: Path, *, orphan: bool = False) -> None:
        ready, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with replace_file(target, force=True) as tmp:
                tmp.write_text("half")
                child = os.fork() if orphan else 1
                if child:
                    os.write(tell, str(child).encode())
                time.sleep(60)
            os._exit(1)
        self.child = int(os.read(ready, 20))

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def test_a_second_writer_is_told_who_writes(tmp_path: Path) -> None:
    target = tmp_path / "a.qcal"
    first = Writer(target)
    try:
        told = rf"is being written by pid {first.pid} since 20\d\d-"
        with pytest.raises(WriteError, match=told) as info, replace_file(target, force=True):
            pytest.fail("the block must not run")
        assert info.value.exit_code == 6
    finally:
        first.kill()
    with replace_file(target) as tmp:
        tmp.write_text("new")
    assert names(tmp_path) == ["a.qcal"], "the killed writer's lock and temporary file are gone"


def test_a_lock_that_a_child_of_a_killed_writer_holds_is_stale(tmp_path: Path) -> None:
    target = tmp_path / "a.qcal"
    first = Writer(target, orphan=True)
    first.kill()
    try:
        with replace_file(target) as tmp:
            tmp.write_text("new")
        assert target.read_text() == "new"
    finally:
        os.kill(first.child, signal.SIGKILL)


def test_two_writers_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    with replace_file(tmp_path / "a") as tmp:
        tmp.write_text("1")
        with pytest.raises(WriteError, match=f"pid {os.getpid()} "), replace_file(tmp_path / "a"):
            pass
        with replace_file(tmp_path / "b") as other:
            other.write_text("2")
    assert names(tmp_path) == ["a", "b"]


def test_a_reused_process_number_is_another_process() -> None:
    me = Process.this()
    assert me.is_alive()
    assert not Process(host=me.host, pid=me.pid, start=me.start + 1).is_alive()
    assert Process(host="elsewhere", pid=2**30, start=1).is_alive(), "nothing is known about another machine"
    assert not Process(host=me.host, pid=2**30, start=1).is_alive()


def test_temporary_files_of_the_living_and_of_others_stay(tmp_path: Path) -> None:
    me = Process.this()
    stem = files._stem(tmp_path / "a")
    kept = [
        tmp_path / f"{stem}-{me.host}-{me.pid}-{me.start}-7.tmp",
        tmp_path / f"{stem}-deadbeef-1-1-7.tmp",
        tmp_path / f"{files._stem(tmp_path / 'b')}-{me.host}-{me.pid}-{me.start + 1}-7.tmp",
    ]
    stale = tmp_path / f"{stem}-{me.host}-{me.pid}-{me.start + 1}-7.tmp"
    for path in [*kept, stale]:
        path.write_text("")
    with replace_file(tmp_path / "a") as tmp:
        tmp.write_text("new")
    assert names(tmp_path) == sorted(["a", *(path.name for path in kept)])


def test_a_long_name_works(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 255)
    with replace_file(target) as tmp:
        tmp.write_text("new")
    assert names(tmp_path) == [target.name]
    with pytest.raises(WriteError, match="name is too long"), replace_file(tmp_path / ("n" * 256)):
        pass
