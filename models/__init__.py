"""Reference models: used by the demo, by benchmarks and by tests only.

Every reference model is a package beside this file that offers the functions of `ReferenceModel`. Nothing heavy is
imported before one of those functions is called: `get("minilm")` costs no torch, `get("minilm").build()` does.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from ..calibrate.errors import UsageError

if TYPE_CHECKING:
    import torch

Batch = dict[str, np.ndarray]

_NAMES = ("digits_cnn", "tiny_gpt", "minilm")


class ReferenceModel(Protocol):
    """What a reference model offers; the packages `models/<name>` satisfy it as modules.

    Attributes:
        METRICS: Metric name -> "higher" or "lower", whichever is better. `score` returns these keys.
        OUTPUTS: Names of the outputs, in the order in which the module returns them.
    """

    METRICS: Mapping[str, str]
    OUTPUTS: Sequence[str]

    def build(self) -> torch.nn.Module:
        """Return the float module with its trained weights, in evaluation mode."""

    def example(self) -> dict[str, torch.Tensor]:
        """Return example inputs by name, in the order of the module's parameters."""

    def dynamic_shapes(self) -> dict[str, dict[int, str]]:
        """Return the dynamic axes of the inputs: input name -> {axis: name of the dimension}."""

    def calibration_batches(self) -> Iterator[Batch]:
        """Yield the calibration data, batch by batch; the same on every call."""

    def evaluation_batches(self) -> Iterator[Batch]:
        """Yield held-out data that calibration and training never saw; the same on every call."""

    def score(self, outputs: Sequence[Batch], reference: Sequence[Batch] | None = None) -> dict[str, float]:
        """Return the metrics of the task.

        Args:
            outputs: The outputs of a model for `evaluation_batches()`, one entry per batch, in the same order.
            reference: The outputs of the float model for the same batches; needed where a metric compares with it.
        """


def names() -> tuple[str, ...]:
    """Return the names of the reference models, smallest first."""
    return _NAMES


def get(name: str) -> ReferenceModel:
    """Return a reference model by name.

    Raises:
        UsageError: There is no model of that name.
    """
    if name not in _NAMES:
        raise UsageError("no such reference model", found=name, expected=" | ".join(_NAMES), do="qpipe demo --help")
    return cast(ReferenceModel, importlib.import_module(f".{name}", __name__))
