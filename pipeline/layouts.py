"""How operators store their weights, and the one layout [out, in] in which weight algorithms see them.

The inputs of a Conv are ordered (kernel position, channel), as integer kernels walk them after unfolding; statistics of
unfolded inputs come ordered (channel, kernel position) and are reordered here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ..calibrate.granularity import PER_TENSOR, per_block, per_channel
from ..calibrate.qarray import QArray, QParams, Spec

Array = npt.NDArray[Any]
RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
"""Operators with two weights ``[directions, out, in]``, of the input and of the state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A weight's own layout, and the way to [out, in] and back.

    Attributes:
        shape: Shape of the weight as the operator sees it.
        order: Axes of the weight, output channels first, in the order of the matrix; the rest is flattened.
        groups: Groups of a Conv: its outputs fall into so many layers with inputs of their own.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    groups: int = 1

    def matrix(self, w: Array) -> Array:
        """Return ``w`` as [out, in]."""
        return w.transpose(self.order).reshape(self.shape[self.order[0]], -1)

    def spec(self, spec: Spec) -> Spec:
        """Return ``spec`` in the axes of [out, in]."""
        granularity = spec.granularity
        if granularity.axis is None:
            moved = PER_TENSOR
        elif granularity.block_size:
            moved = per_block(1, granularity.block_size)
        else:
            moved = per_channel(0)
        return dataclasses.replace(spec, granularity=moved)

    def restore(self, qarray: QArray, spec: Spec) -> QArray:
        """Return codes [out, in] in the weight's own layout, under its own ``spec``."""
        params = qarray.params
        zero = None if params.zero_point is None else self._scales_back(params.zero_point, spec)
        stored = params.scale_codes
        if stored is not None:
            stored = dataclasses.replace(stored, q=self._scales_back(stored.q, spec))
        own = QParams(scale=self._scales_back(params.scale, spec), zero_point=zero, spec=spec, scale_codes=stored)
        return QArray(q=self._back(qarray.q, tuple(self.shape[axis] for axis in self.order)), params=own)

    def columns(self) -> Array:
        """Return, for each input of the matrix, its place among inputs ordered (channel, kernel position)."""
        kernel = self.shape[2:]
        if self.order[1:] != (*range(2, len(self.shape)), 1) or not kernel:
            return np.arange(int(np.prod([self.shape[axis] for axis in self.order[1:]])))
        places = np.arange(self.shape[1] * int(np.prod(kernel))).reshape(self.shape[1], -1)
        return places.T.reshape(-1)

    def _scales_back(self, values: Array, spec: Spec) -> Array:
        if values.ndim == 0:
            return values
        target = spec.granularity.scale_shape(self.shape)
        return self._back(values, tuple(target[axis] for axis in self.order))

    def _back(self, values: Array, moved: tuple[int, ...]) -> Array:
        inverse = tuple(int(i) for i in np.argsort(self.order))
        return np.ascontiguousarray(values.reshape(moved).transpose(inverse))


def layout_of(node: gs.Node, shape: tuple[int, ...]) -> Layout:
    """Return the layout of the weight of a weighted operator.

    Args:
        node: MatMul, Gemm, Conv, ConvTranspose or a recurrent operator; or the Gather of rows of a table, which count
            as outputs.
        shape: Shape of its weight as it sees it.
    """
    rank = len(shape)
    if node.op == "Conv":
        return Layout(shape=shape, order=(0, *range(2, rank), 1), groups=int(node.attrs.get("group", 1)))
    if node.op == "ConvTranspose":
        return Layout(shape=shape, order=(1, *range(2, rank), 0), groups=int(node.attrs.get("group", 1)))
    if node.op in RECURRENT:
        return Layout(shape=shape, order=(1, 0, 2))
    if node.op == "Gather":
        return Layout(shape=shape, order=tuple(range(rank)))
    if node.op == "Gemm" and node.attrs.get("transB", 0):
        return Layout(shape=shape, order=(0, 1))
    # MatMul and Gemm store [in, out]; a stack of matrices keeps its stack among the inputs.
    return Layout(shape=shape, order=(rank - 1, *range(rank - 1)))
