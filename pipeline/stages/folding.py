"""Folding: divide a tensor by a scale per channel inside what makes it, so that it costs nothing at run time.

A LayerNorm or RMSNorm has a gain and a shift per channel; a Mul or an Add of a constant, and the columns of a MatMul or
Gemm with a constant weight, take it as well; a Relu lets a positive factor through to what is before it. Attention does
so too: each channel of a head is a weighted sum of that channel of the values, so its scale moves through the product,
the split into heads and a Split of fused projections to the columns that make the values.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
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
"""Node, input, and what the constant that stands there is to be divided by."""
Found = tuple[list[Edit], list[gs.Tensor]]
"""Constants to divide, and the tensors on the way to them."""

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
    for node, index, divisor in edits:
        old = node.inputs[index]
        parameter = weight_of(old)
        assert parameter is not None
        values = parameter.values()
        divided = (np.asarray(values, np.float32) / divisor).astype(values.dtype)
        node.inputs[index] = constant(names(f"{old.name}_equalized"), divided)
    for inner in between:
        inner.name = names(f"{inner.name}_equalized")
    return True


def can_fold(tensor: gs.Tensor, width: int, kept: Collection[int] = ()) -> bool:
    """Whether `fold` would divide ``tensor``, whose last axis has ``width`` channels."""
    return _Search(scale=np.ones(width, np.float32), kept=kept).edits(tensor) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """Looks for the constants in which a tensor can be divided.

    Attributes:
        scale: Divisor, lined up with the last axes of the tensor, 1 along those on which it does not depend.
        kept: ``id`` of tensors whose values must stay.
    """

    scale: Array
    kept: Collection[int]

    def edits(self, tensor: gs.Tensor) -> Found | None:
        """Return the constants to divide and the tensors on the way; None where the scale cannot go."""
        node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if node is None or node.domain:
            return None
        if node.op == "Split":
            return self._moved(node.inputs[0], _before_split(self.scale, node, tensor))
        if len([t for t in node.outputs if not t.is_empty()]) != 1:
            return None
        if node.op in THROUGH:
            return self._moved(node.inputs[0], self.scale)
        if node.op == "Reshape":
            return self._moved(node.inputs[0], _before_reshape(self.scale, node.inputs[0].shape, tensor.shape))
        if node.op == "Transpose":
            return self._moved(node.inputs[0], _before_transpose(self.scale, node, tensor.shape))
        if node.op == "MatMul" and weight_of(node.inputs[1]) is None:
            return self._moved(node.inputs[1], self.scale if self._passes(node.inputs[1].shape) else None)
        return self._parameters(node) if self.scale.ndim == 1 else None

    def _parameters(self, node: gs.Node) -> Found | None:
        """Return the constants of a node that give each channel of its output a factor of its own."""
        if node.op in NORMS:
            return self._constants(node, range(1, len(node.inputs)))
        if node.op == "MatMul":
            return self._constants(node, [1])
        if node.op == "Gemm":
            return self._gemm(node)
        return self._elementwise(node) if node.op in ("Mul", "Add") else None

    def _passes(self, shape: Sequence[Any] | None) -> bool:
        """Whether the right operand of a product, of ``shape``, can be divided in place of the product.

        It can where the scale does not depend on rows, and the operand is not repeated along an axis on which it does.
        """
        if self.scale.ndim > 1 and self.scale.shape[-2] != 1:
            return False
        sizes = [] if shape is None else list(shape)[::-1]
        return all(size in (1, *sizes[i : i + 1]) for i, size in enumerate(self.scale.shape[::-1]))

    def _moved(self, tensor: gs.Tensor, scale: Array | None) -> Found | None:
        """Return the edits before a tensor that has one reader, and that is to be divided by ``scale``."""
        if scale is None or len(tensor.outputs) != 1 or id(tensor) in self.kept:
            return None
        while scale.ndim > 1 and len(scale) == 1:
            scale = scale[0]
        found = _Search(scale=scale, kept=self.kept).edits(tensor)
        return None if found is None else (found[0], [tensor, *found[1]])

    def _constants(self, node: gs.Node, slots: Iterable[int]) -> Found | None:
        edits = [self._divided(node, slot, whole=True) for slot in slots if not node.inputs[slot].is_empty()]
        known = [edit for edit in edits if edit is not None]
        return (known, []) if len(known) == len(edits) else None

    def _gemm(self, node: gs.Node) -> Found | None:
        weight = weight_of(node.inputs[1])
        if weight is None or weight.shape[0 if node.attrs.get("transB", 0) else 1] != len(self.scale):
            return None
        edits: list[Edit] = [(node, 1, self.scale[:, None] if node.attrs.get("transB", 0) else self.scale)]
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
        if node.op == "Mul":
            return [edit], []
        found = self._moved(node.inputs[1 - slot], self.scale)
        return None if found is None else ([edit, *found[0]], found[1])

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
        return node, slot, self.scale


def _before_reshape(scale: Array, before: Sequence[Any] | None, after: Sequence[Any] | None) -> Array | None:
    """Return a divisor of the result of a Reshape as one of its input; None where their last axes do not match."""
    tail = list(after or [])[-scale.ndim :]
    if len(tail) < scale.ndim or not all(size in (1, known) for size, known in zip(scale.shape, tail, strict=True)):
        return None
    for start in reversed(range(len(before or []))):
        sizes = list(before or [])[start:]
        if not all(isinstance(size, int) for size in (*sizes, *tail)) or math.prod(sizes) > math.prod(tail):
            return None
        if math.prod(sizes) == math.prod(tail):
            return np.broadcast_to(scale, tail).reshape(sizes)
    return None


def _before_transpose(scale: Array, node: gs.Node, shape: Sequence[Any] | None) -> Array | None:
    """Return a divisor of the result of a Transpose, of ``shape``, as one of its input."""
    if shape is None or len(shape) < scale.ndim:
        return None
    order = node.attrs.get("perm", list(range(len(shape)))[::-1])
    return scale.reshape((1,) * (len(shape) - scale.ndim) + scale.shape).transpose(np.argsort(order))


def _before_split(scale: Array, node: gs.Node, tensor: gs.Tensor) -> Array | None:
    """Return a divisor of one result of a Split along the last axis as one of its input: the others keep theirs."""
    shapes = [output.shape for output in node.outputs]
    if scale.ndim != 1 or any(not shape or not isinstance(shape[-1], int) for shape in shapes):
        return None
    if node.attrs.get("axis", 0) not in (-1, len(shapes[0]) - 1):
        return None
    parts = [scale if output is tensor else np.ones(output.shape[-1], scale.dtype) for output in node.outputs]
    return np.concatenate(parts)
