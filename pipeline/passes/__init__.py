"""Passes: graph -> graph. The order matters, so it is visible here.

`PASSES` run before anything is decided, for every target; `TARGET_PASSES` at the end, for the targets that name them.

A pass works on one graph at a time, the main one or a body; nodes without use are left to `stages.prepare`.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_graphsurgeon as gs

from ..fresh import FreshNames
from .attention_to_matmul import attention_to_matmul
from .densify_sparse import densify_sparse
from .einsum_to_matmul import einsum_to_matmul
from .floor_masked_softmax import floor_masked_softmax
from .fold_batchnorm import fold_batchnorm
from .keep_sums_apart import keep_sums_apart
from .lower_constants import lower_constants
from .remove_identity import remove_identity
from .sum_behind_products import sum_behind_products

Pass = Callable[[gs.Graph, FreshNames], int]
"""Changes one graph in place and returns how many places it changed."""

PASSES: tuple[Pass, ...] = (
    lower_constants,
    densify_sparse,
    remove_identity,
    einsum_to_matmul,
    attention_to_matmul,
    fold_batchnorm,
)

TARGET_PASSES: dict[str, Pass] = {
    run.__name__: run for run in (keep_sums_apart, floor_masked_softmax, sum_behind_products)
}
"""By name, in order. The first line of a pass's docstring, up to "; return", is what a plan prints of it."""
