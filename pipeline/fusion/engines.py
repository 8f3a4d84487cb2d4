"""Who can be asked what became of a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..graph import Model
from . import Evidence, openvino, ort, rules

Engine = Callable[[Model, "Path | None"], Evidence]
"""Model, and the file that holds just this model, or None -> evidence."""


def _by_rule(model: Model, _file: Path | None, *, runtime: str) -> Evidence:
    return rules.evidence(model, runtime)


ENGINES: dict[str, Engine] = {
    "ort": ort.evidence,
    "openvino": openvino.evidence,
    **{name: partial(_by_rule, runtime=name) for name in rules.RULES},
}
"""By the name under which a target names its engine."""
