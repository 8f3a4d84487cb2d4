"""Rules that a Q/DQ model has to keep; one file per family, one function per rule.

``onnx.checker`` accepts scales that are NaN, infinite, zero or negative, axes that do not exist and lengths that do
not fit; runtimes then refuse to load the file or return wrong numbers without a word. A rule is a function from a
`Context` to the places that break it. Its docstring says what must hold, why, and where that is written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...calibrate.registry import Registry
from .context import Context, Problem

Check = Callable[[Context], Iterator[Problem]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule of the checker.

    Attributes:
        name: Name in reports, in words joined by hyphens.
        severity: ``"error"`` (wrong results, or refused by runtimes) or ``"warning"`` (legal, most likely unwanted).
        do: What mends it.
        check: Yields the places that break the rule.
    """

    name: str
    severity: str
    do: str
    check: Check

    @property
    def why(self) -> str:
        """What must hold and why, from the docstring of the check."""
        return inspect.getdoc(self.check) or ""


RULES: Registry[Rule] = Registry("check", __name__)


def rule(name: str, severity: str, *, do: str) -> Callable[[Check], Check]:
    """Return a decorator that registers a check function under ``name``."""

    def register(check: Check) -> Check:
        RULES.add(name, Rule(name=name, severity=severity, do=do, check=check))
        return check

    return register
