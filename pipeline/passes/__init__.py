"""Passes: graph -> graph, before anything is decided. The order matters, so it is visible here."""

from __future__ import annotations

from collections.abc import Callable

import onnx_graphsurgeon as gs

from .fold_batchnorm import fold_batchnorm
from .lower_constants import lower_constants
from .remove_identity import remove_identity

Pass = Callable[[gs.Graph], int]
"""Changes the graph in place and returns how many places it changed."""

PASSES: tuple[Pass, ...] = (lower_constants, remove_identity, fold_batchnorm)
