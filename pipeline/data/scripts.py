"""The user's own code as a source of data: ``script.py:function``, and whatever that function returns.

Such a script is trusted: it runs with all rights of the user. What it raises is reported with the line of the script.
"""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import random
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from ...calibrate.errors import DataError, QpipeError

DEFAULT_FUNCTION = "load_data"

_SERIAL = itertools.count()


def split_script(argument: str) -> tuple[Path, str] | None:
    """Split ``script.py[:function]``; None when ``argument`` is nothing of the kind."""
    path, colon, function = argument.rpartition(":")
    if colon and path.endswith(".py"):
        return Path(path), function
    return (Path(argument), DEFAULT_FUNCTION) if argument.endswith(".py") else None


class UserCode:
    """Context in which an exception is the user's: it becomes a `DataError` that names their last line.

    Args:
        path: Their script, None when the code came as an object.
        what: What their code was doing.
    """

    def __init__(self, path: Path | None, what: str) -> None:
        self._path = path
        self._what = what

    def __enter__(self) -> None:
        """Begin to watch."""

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Translate what was raised, if it is an error and not an interruption."""
        if isinstance(error, QpipeError) or not isinstance(error, Exception | SystemExit):
            return
        raise DataError(
            f"{self._what} raised {type(error).__name__}: {error}",
            where=self._place(error, tb),
            do="mend the script; --debug shows the whole traceback",
        ) from error

    def _place(self, error: BaseException, tb: TracebackType | None) -> str | None:
        if isinstance(error, SyntaxError) and error.filename:
            return f"{error.filename}:{error.lineno}"
        frames = traceback.extract_tb(tb)
        own = [frame for frame in frames if self._path is not None and Path(frame.filename) == self._path]
        foreign = [frame for frame in frames if frame.filename != __file__]
        last = (own or foreign or [None])[-1]
        return f"{last.filename}:{last.lineno}, in {last.name}" if last else None


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, numpy and, once it is imported, torch; those a script makes are its own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)


def run_script(path: Path, function: str, seed: int | None = None) -> Iterator[Any]:
    """Run ``function()`` of a script and yield what it yields.

    Args:
        path: The script.
        function: Name of the function.
        seed: `seed_generators` with it before anything of the script runs, None to leave them alone.

    Raises:
        DataError: The script or the function is missing, or the script raised.
    """
    path = path.resolve()
    if not path.is_file():
        raise DataError("no such script", where=str(path), do="check the path given to --data")
    folder = str(path.parent)
    sys.path.insert(0, folder)
    try:
        with UserCode(path, f"{path.name}"):
            if seed is not None:
                seed_generators(seed)
            module = _import(path)
            if seed is not None:  # again: importing may have brought torch, and drawn numbers
                seed_generators(seed)
        make = getattr(module, function, None)
        if not callable(make):
            names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            near = difflib.get_close_matches(function, names, n=1, cutoff=0.4) or names[:1]
            remedy = f"--data {path.name}:{near[0]}" if near else f"write a function {function}() that yields dicts"
            raise DataError(f"{path.name} has no function {function!r}", where=str(path), do=remedy)
        with UserCode(path, f"{function}()"):
            made = make()
        yield from iterate(made, path, f"{function}()")
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def iterate(source: Any, path: Path | None, what: str) -> Iterator[Any]:
    """Yield the batches of a generator, a loader, a list, one dict, or an object with ``get_next()``.

    Raises:
        DataError: ``source`` is none of these, or its code raised.
    """
    if isinstance(source, Mapping):
        yield source
        return
    with UserCode(path, what):
        if hasattr(source, "get_next"):
            items: Iterator[Any] = iter(source.get_next, None)
        elif isinstance(source, Iterable) and not isinstance(source, str | bytes):
            items = iter(source)
        else:
            raise DataError(
                f"{what} gave {type(source).__name__}",
                where=str(path) if path else None,
                expected="a generator of dicts {input name: array}",
                do="yield one dict per batch, or return a list of them",
            )
    end = object()
    while True:
        with UserCode(path, what):
            item = next(items, end)
        if item is end:
            return
        yield item


def _import(path: Path) -> ModuleType:
    name = f"_qpipe_user_{next(_SERIAL)}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise DataError("this script cannot be imported", where=str(path))
    module = importlib.util.module_from_spec(spec)
    # Registered, so that classes of the script can be pickled to the workers of a torch DataLoader.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
