"""Write inputs and outputs in polygraphy's own format, so that its tools can read what a run saw and gave.

A path with a suffix is one JSON file; a path without one is a folder with a file per batch, written in constant memory.
Source: polygraphy 0.53, ``--save-inputs``, ``--save-outputs``, ``--load-inputs``, ``--load-outputs``.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.typing as npt
from polygraphy.comparator import IterationResult, RunResults
from polygraphy.json import save_json

from ..calibrate.errors import UnsupportedError, WriteError
from .files import replace_file, writing

Arrays = Mapping[str, npt.NDArray[Any]]

_DIGITS = 10


class Recorder:
    """Writes one mapping of arrays after the other; what was begun disappears when the block fails.

    Args:
        path: Where to.
        runner: Name of the runner that computed the arrays, None when they are inputs.
        force: Replace an existing file or folder.

    Raises:
        WriteError: Something is at ``path`` already (without ``force``), or it cannot be written.
    """

    def __init__(self, path: Path, *, runner: str | None = None, force: bool = False) -> None:
        self._path, self._runner, self._force = path, runner, force
        self._single = bool(path.suffix)
        self._kept: list[Any] = []
        self._count = 0
        self._folder = path.with_name(f".{path.name}-{os.getpid()}.tmp")
        if not self._single:
            self._refuse_existing()

    def __enter__(self) -> Recorder:
        if not self._single:
            with writing(self._path):
                self._folder.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._put_in_place()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def append(self, arrays: Arrays) -> None:
        """Add the arrays of one batch.

        Raises:
            UnsupportedError: One of them is a sequence.
        """
        held = {name: _plain(name, array) for name, array in arrays.items()}
        item = held if self._runner is None else IterationResult(held, 0.0, self._runner)
        if self._single:
            # Runtimes may use the same memory for the next batch.
            self._kept.append(copy.deepcopy(item))
        else:
            with writing(self._path):
                save_json(self._form([item], single=False), str(self._folder / f"{self._count:0{_DIGITS}d}.json"))
        self._count += 1

    def _form(self, items: list[Any], *, single: bool) -> Any:
        if self._runner is not None:
            return RunResults([(self._runner, items)])
        return items if single else items[0]

    def _put_in_place(self) -> None:
        if self._single:
            with replace_file(self._path, force=self._force) as temporary:
                save_json(self._form(self._kept, single=True), str(temporary))
            return
        with writing(self._path):
            if self._path.is_dir():
                shutil.rmtree(self._path)
            self._folder.replace(self._path)

    def _refuse_existing(self) -> None:
        if self._path.is_dir() and not any(self._path.iterdir()):
            return
        if self._path.exists() and not (self._force and self._path.is_dir()):
            raise WriteError(
                "the folder for recorded batches exists already",
                where=str(self._path),
                expected="a new or empty folder, or a name with a suffix for a single file",
                do="choose another name, or give --force to replace it",
            )


def _plain(name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array without Python objects, which the format refuses: strings all as long as the longest."""
    if array.dtype != object:
        return array
    if all(isinstance(item, str) for item in array.flat):
        return array.astype(str)
    raise UnsupportedError(
        "polygraphy's format has no place for a sequence",
        where=name,
        expected="arrays of numbers or strings",
        do="leave out --save-outputs, or make its tensors outputs of their own",
    )
