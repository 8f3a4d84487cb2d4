"""Saving statistics on the way, so that a run that is stopped or killed can go on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...calibrate.errors import WriteError
from .qcal import load, save
from .record import Calibration

_SAVING_SHARE = 0.05  # of the time, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """Where statistics are saved, during a run and at its end.

    Attributes:
        path: The ``.qcal`` file.
        resume: Go on from the file if it is there; the data must be the same from its start.
        force: Replace an existing file.
        batches: Save after so many batches, None for no such rule.
        seconds: Save after so many seconds; less often where saving takes long.
    """

    path: Path
    resume: bool = False
    force: bool = False
    batches: int | None = None
    seconds: float = 30.0


class Saver:
    """Saves what ``result`` returns when it is time.

    Args:
        options: When and where, None for never.
        result: Returns the statistics so far.

    Raises:
        WriteError: The target exists, and is neither to be replaced nor to be resumed.
    """

    def __init__(self, options: Checkpoints | None, result: Callable[[], Calibration]) -> None:
        self._options = options
        self._result = result
        self._batches = 0
        self._saved_at = time.monotonic()
        self._took = 0.0
        if options is not None and options.path.exists() and not (options.force or options.resume):
            raise WriteError(
                "the target exists already",
                where=str(options.path),
                do="give --resume to go on with it, --force to replace it, or another name with -o",
            )

    def earlier(self) -> Calibration | None:
        """Return what an earlier run has saved, if it is to be resumed."""
        if self._options is None or not self._options.resume or not self._options.path.exists():
            return None
        return load(self._options.path)

    def tick(self, may_save: bool) -> None:
        """Count one step, and save when it is time."""
        self._batches += 1
        if may_save and self.due():
            self.save()

    def due(self, ahead: int = 0) -> bool:
        """Whether it is time to save, or will be ``ahead`` steps from now."""
        if self._options is None:
            return False
        passed = time.monotonic() - self._saved_at
        most = self._options.batches
        is_late = passed >= max(self._options.seconds, self._took / _SAVING_SHARE)
        return is_late or (most is not None and self._batches + ahead >= most)

    def save(self) -> None:
        """Save now."""
        if self._options is None:
            return
        start = time.monotonic()
        save(self._result(), self._options.path, force=True)
        self._batches, self._saved_at = 0, time.monotonic()
        self._took = self._saved_at - start
