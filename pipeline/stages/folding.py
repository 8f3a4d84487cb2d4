"""Folding: divide a tensor by a scale per channel inside what makes it, so that it costs nothing at run time.

A LayerNorm or RMSNorm has a gain and a shift per channel; a Mul or an Add of a constant, and the columns of a MatMul or
Gemm with a constant weight, take it as well; a Relu lets a positive factor through to what is before it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ..constants import weight_of
from ..fresh import FreshNames
from ..graph import constant

Array = npt.NDArray[Any]
Edit = tuple[gs.Node, int, Array]
"""Node, input and the constant that is to stand there."""
Found = tuple[list[Edit], list[gs.Tensor]]
"""Constants to replace, and the tensors on the way to them."""

NORMS = ("LayerNormalization", "RMSNormalization")
THROUGH = ("Relu", "LeakyRelu", "Identity", "Dropout")


def fold(tensor: gs.Tensor, scale: Array, names: FreshNames, kept: Collection[int] = ()) -> bool:
    """Divide the last axis of ``tensor`` by ``scale`` in what makes it; whether that was possible.

    Tensors on the way are renamed: they hold other values than before, and statistics of them are void.

    Args:
        tensor: Whose readers all expect it divided.
        scale: Per channel, > 0, [in].
        names: Gives out fresh names.
        kept: ``id`` of tensors that must keep their values, above all outputs of the model.
    """
    found = _Search(scale=scale, kept=kept).edits(tensor)
    if found is None:
        return False
    edits, between = found
    for node, index, values in edits:
        old = node.inputs[index]
        node.inputs[index] = constant(names(f"{old.name}_equalized"), values)
    for inner in between:
        inner.name = names(f"{inner.name}_equalized")
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """Looks for the constants in which a tensor can be divided.

    Attributes:
        scale: Divisor of its last axis, [in].
        kept: ``id`` of tensors whose values must stay.
    """

    scale: Array
    kept: Collection[int]

    def edits(self, tensor: gs.Tensor) -> Found | None:
        """Return the constants to replace and the tensors on the way; None where the scale cannot go."""
        node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if node is None or node.domain or len([t for t in node.outputs if not t.is_empty()]) != 1:
            return None
        if node.op in NORMS:
            return self._constants(node, range(1, len(node.inputs)))
        if node.op in THROUGH:
            return self._behind(node.inputs[0], [])
        if node.op == "MatMul":
            return self._constants(node, [1])
        if node.op == "Gemm":
            return self._gemm(node)
        return self._elementwise(node) if node.op in ("Mul", "Add") else None

    def _behind(self, tensor: gs.Tensor, edits: list[Edit]) -> Found | None:
        """Return the edits before a tensor that has one reader, with ``edits`` added."""
        if len(tensor.outputs) != 1 or id(tensor) in self.kept:
            return None
        found = self.edits(tensor)
        return None if found is None else ([*edits, *found[0]], [tensor, *found[1]])

    def _constants(self, node: gs.Node, slots: Iterable[int]) -> Found | None:
        edits = [self._divided(node, slot, whole=True) for slot in slots if not node.inputs[slot].is_empty()]
        known = [edit for edit in edits if edit is not None]
        return (known, []) if len(known) == len(edits) else None

    def _gemm(self, node: gs.Node) -> Found | None:
        weight = weight_of(node.inputs[1])
        if weight is None or weight.shape[0 if node.attrs.get("transB", 0) else 1] != len(self.scale):
            return None
        old = weight.values()
        divisor = self.scale[:, None] if node.attrs.get("transB", 0) else self.scale
        edits: list[Edit] = [(node, 1, (np.asarray(old, np.float32) / divisor).astype(old.dtype))]
        if len(node.inputs) > 2 and not node.inputs[2].is_empty():
            bias = self._divided(node, 2)
            if bias is None:
                return None
            edits.append(bias)
        return edits, []

    def _elementwise(self, node: gs.Node) -> Found | None:
        slot = next((i for i, entry in enumerate(node.inputs) if weight_of(entry) is not None), None)
        edit = None if slot is None else self._divided(node, slot)
        if slot is None or edit is None:
            return None
        return ([edit], []) if node.op == "Mul" else self._behind(node.inputs[1 - slot], [edit])

    def _divided(self, node: gs.Node, slot: int, *, whole: bool = False) -> Edit | None:
        """Return a constant with its last axis divided; None when it is none, or of another width.

        Args:
            node: Reads the constant.
            slot: As this input.
            whole: The constant must have an entry per channel; otherwise one for all will do too.
        """
        parameter = weight_of(node.inputs[slot])
        width = None if parameter is None else parameter.shape[-1] if parameter.shape else 1
        if parameter is None or (width != len(self.scale) and (whole or width != 1)):
            return None
        old = parameter.values()
        return node, slot, (np.asarray(old, np.float32) / self.scale).astype(old.dtype)
