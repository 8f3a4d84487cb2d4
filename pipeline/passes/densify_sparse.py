"""Sparse initializers become dense ones, unless that takes much memory: weights are then all found the same way."""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from ..constants import is_sparse
from ..fresh import FreshNames
from ..graph import constants, values

LARGEST = 64 * 2**20
"""Bytes up to which a sparse constant is stored dense."""


def densify_sparse(graph: gs.Graph, names: FreshNames) -> int:
    """Store small sparse constants dense; return how many."""
    del names
    count = 0
    for tensor in list(constants(graph)):
        if is_sparse(tensor) and math.prod(tensor.shape) * tensor.dtype.itemsize <= LARGEST:
            tensor._values = values(tensor)
            count += 1
    return count
