"""Passes: graph -> graph, before anything is decided. The order matters, so it is visible here.

A pass works on one graph at a time, the main one or a body; nodes without use are left to `stages.prepare`.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_graphsurgeon as gs

from ..fresh import FreshNames
from .densify_sparse import densify_sparse
from .einsum_to_matmul import einsum_to_matmul
from .fold_batchnorm import fold_batchnorm
from .lower_constants import lower_constants
from .remove_identity import remove_identity

Pass = Callable[[gs.Graph, FreshNames], int]
"""Changes one graph in place and returns how many places it changed."""

PASSES: tuple[Pass, ...] = (lower_constants, densify_sparse, remove_identity, einsum_to_matmul, fold_batchnorm)
