"""Weights as an operator sees them: a constant, seen through the layout operators between it and the operator.

Exporters write ``MatMul(x, Transpose(W))``. Folding that in the graph would copy every float weight, so it is looked
through instead: only a weight that is really quantized is ever laid out anew, and then as codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import SparseValues

from .graph import values

FLOATS = frozenset({"float32", "float16", "bfloat16", "float64"})
QUANTIZABLE = frozenset({"float32", "float16", "bfloat16"})
"""Element types that QuantizeLinear takes and DequantizeLinear gives."""
_MAX_STEPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A constant and the layout steps between it and its user.

    Attributes:
        constant: Where the values lie.
        steps: ``("T", perm)``, ``("R", shape)`` in the order in which they are applied.
        shape: Shape after the steps.
    """

    constant: gs.Constant
    steps: tuple[tuple[str, tuple[int, ...]], ...]
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        """Name that is the same for the same values in the same layout."""
        return self.constant.name + "".join(f"|{kind}{list(how)}" for kind, how in self.steps)

    def values(self) -> npt.NDArray[Any]:
        """Return the values in the layout that the operator sees; a view of the memory map where that is possible."""
        array = np.asarray(values(self.constant))
        for kind, how in self.steps:
            array = array.transpose(how) if kind == "T" else array.reshape(how)
        return array


def is_float(tensor: gs.Tensor) -> bool:
    """Whether a tensor is known to hold floating-point numbers."""
    return tensor.dtype is not None and dtype_name(tensor) in FLOATS


def dtype_name(tensor: gs.Tensor) -> str:
    """Return the name of a tensor's element type, ``""`` when unknown."""
    if tensor.dtype is None:
        return ""
    if isinstance(tensor.dtype, int):  # onnx.TensorProto.DataType of the types that numpy lacks
        import onnx

        return onnx.TensorProto.DataType.Name(tensor.dtype).lower()
    return np.dtype(tensor.dtype).name


def weight_of(tensor: gs.Tensor) -> Weight | None:
    """Return the constant behind a tensor, looking through layout operators; None for none, or a sparse one."""
    steps: list[tuple[str, tuple[int, ...]]] = []
    for _ in range(_MAX_STEPS):
        if isinstance(tensor, gs.Constant):
            return None if is_sparse(tensor) else _with_shape(tensor, tuple(reversed(steps)))
        node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if node is None or not node.inputs or node.domain:
            return None
        if node.op == "Transpose":
            steps.append(("T", tuple(node.attrs.get("perm", ()))))
        elif node.op == "Reshape" and isinstance(node.inputs[1], gs.Constant) and not node.attrs.get("allowzero", 0):
            steps.append(("R", tuple(int(d) for d in values(node.inputs[1]))))
        elif node.op != "Identity":
            return None
        tensor = node.inputs[0]
    return None


def _with_shape(constant: gs.Constant, steps: tuple[tuple[str, tuple[int, ...]], ...]) -> Weight | None:
    """Resolve the steps from a constant on; of reshapes in a row only the last one counts, if it changes anything."""
    shapes = [tuple(int(d) for d in constant.shape)]
    resolved: list[tuple[str, tuple[int, ...]]] = []
    for kind, how in steps:
        shape = shapes[-1]
        if kind == "T":
            order = how or tuple(range(len(shape)))[::-1]
            if len(order) != len(shape):
                return None
            resolved.append((kind, order))
            shapes.append(tuple(shape[axis] for axis in order))
            continue
        target = tuple(shape[i] if d == 0 else d for i, d in enumerate(how))
        known = int(np.prod([d for d in target if d > 0]))
        target = tuple(int(np.prod(shape)) // max(known, 1) if d == -1 else d for d in target)
        if resolved and resolved[-1][0] == "R":
            resolved.pop()
            shapes.pop()
        if target != shapes[-1]:
            resolved.append((kind, target))
            shapes.append(target)
    return Weight(constant=constant, steps=tuple(resolved), shape=shapes[-1])


def is_sparse(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a constant that is stored sparse."""
    return isinstance(tensor, gs.Constant) and isinstance(tensor._values, SparseValues)
