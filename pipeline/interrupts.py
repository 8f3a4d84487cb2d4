"""Ctrl-C and SIGTERM as a request to finish the step at hand, save and stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run that stopped on request, after it saved what it had.

    Attributes:
        exit_code: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, text: str, signum: int) -> None:
        super().__init__(text)
        self.exit_code = 128 + signum


class StopRequest:
    """Context in which the first Ctrl-C or SIGTERM is only noted; the second one stops at once.

    Outside the main thread, where Python does not deliver signals, nothing is changed.

    Attributes:
        signum: The signal that came, 0 before any.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum:
            raise Interrupted("stopped at once", signum)
        self.signum = signum
