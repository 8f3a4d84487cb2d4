"""The record that `qpipe export` works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Axes = Mapping[str, Mapping[int, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exportable:
    """A module and what exporting it needs.

    Attributes:
        module: The module, or an ExportedProgram.
        example: Example inputs by name, in the order of the module's parameters.
        dynamic: Input name -> {axis: name of the dimension}.
        outputs: Names of the outputs; empty keeps the exporter's names.
    """

    module: torch.nn.Module | torch.export.ExportedProgram
    example: Mapping[str, torch.Tensor]
    dynamic: Axes
    outputs: Sequence[str] = ()
