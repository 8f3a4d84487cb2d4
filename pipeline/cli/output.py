"""What commands print: results on stdout (text, or exactly one JSON object), everything else on stderr."""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ...calibrate.errors import QpipeError

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEMA_VERSION = 1
_PLAIN_SECONDS = 10.0  # between lines of progress where there is no terminal
_CONTROL = dict.fromkeys((*range(9), *range(11, 32), 127))


def clean(text: str) -> str:
    """Return ``text`` without control characters: names come from files that others made."""
    return text.translate(_CONTROL)


def emit(data: dict[str, Any], as_json: bool, lines: Iterable[str]) -> None:
    """Print a result: one JSON object, or ``lines`` of text."""
    if as_json:
        click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **data}, default=_plain))
        return
    for line in lines:
        click.echo(clean(line))


def width() -> int:
    """Return how wide text may be: the terminal's width, and plenty where there is none."""
    return shutil.get_terminal_size((160, 40)).columns if sys.stdout.isatty() else 160


def note(text: str) -> None:
    """Tell the user something on stderr."""
    click.echo(clean(text), err=True)


def warn(text: str) -> None:
    """Warn the user on stderr."""
    note(f"warning: {text}")


def fail(error: QpipeError, *, as_json: bool) -> None:
    """Print an error: on stderr for people, and as the one JSON object when JSON was asked for."""
    if as_json:
        found = {"type": type(error).__name__, "what": error.what, **error.parts(), "exit_code": error.exit_code}
        click.echo(json.dumps({"schema_version": SCHEMA_VERSION, "error": found}))
    lines = str(error).splitlines()
    note("\n".join([f"error: {lines[0]}", *lines[1:]]))


def bug(error: Exception) -> int:
    """Print a bug in qpipe and return its exit code."""
    if os.environ.get("QPIPE_DEBUG"):
        traceback.print_exception(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    note(f"error: a bug in qpipe: {type(error).__name__}: {error}")
    note(f"  where    : {os.path.basename(last.filename)}:{last.lineno} in {last.name}")  # noqa: PTH119
    note("  do       : run again with QPIPE_DEBUG=1 and report what it prints")
    return 70


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return a table as lines: columns as wide as their content, numbers to the right."""
    cells = [[str(h) for h in headers], *[["" if c is None else str(c) for c in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    numeric = [all(_is_number(row[i]) for row in cells[1:]) and len(cells) > 1 for i in range(len(headers))]
    lines = [
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)).rstrip()
        for row in cells
    ]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]


@contextmanager
def progress(what: str, total: int | None, *, quiet: bool = False) -> Iterator[Callable[[int, str], None]]:
    """Show progress on stderr: a bar on a terminal, a plain line now and then elsewhere.

    Yields:
        A function ``advance(done, remark)``, called with how much is done in all.
    """
    if quiet:
        yield lambda _done, _remark: None
    elif sys.stderr.isatty():
        with _bar(what, total) as advance:
            yield advance
    else:
        yield _plain_progress(what, total)


@contextmanager
def _bar(what: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[remark]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=total, remark="")
        yield lambda done, remark: bars.update(task, completed=done, remark=remark)


def _plain_progress(what: str, total: int | None) -> Callable[[int, str], None]:
    import time

    start = last = time.monotonic()
    skipped: int | None = None  # what a resumed run finds done says nothing about its speed

    def advance(done: int, remark: str) -> None:
        nonlocal last, skipped
        now = time.monotonic()
        if skipped is None:
            skipped = done
        if now - last >= _PLAIN_SECONDS:
            last = now
            if total and skipped < done <= total:
                remark += f", {_duration((now - start) / (done - skipped) * (total - done))} left"
            note(f"{what}: {done}{f' of {total}' if total else ''}  {remark}")

    return advance


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _is_number(text: str) -> bool:
    return text in ("", "-") or text.lstrip("-+").rstrip("x%").replace(".", "", 1).replace("e-", "", 1).isdigit()


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    return str(value)
