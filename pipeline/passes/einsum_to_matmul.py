"""An Einsum that multiplies an activation by a constant matrix becomes that MatMul, which has an integer kernel.

Letters: ``M`` the indices that only the activation and the result have, ``K`` those that are summed over, ``N`` those
that only the weight and the result have. ``X [M.., K..]`` and ``W [K.., N..]`` are brought into that order and their
``K`` and ``N`` each into one axis; the product ``[M.., N]`` is then brought into the order of the result.
The weight is not touched here: what lays it out is looked through, and runs on codes or is folded by the runtime.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from ..constants import Weight, weight_of
from ..fresh import FreshNames
from ..graph import constant

ELLIPSIS = "."
"""Stands for the three dots of an equation, which here stand for leading axes."""


@dataclass(frozen=True, slots=True)
class Product:
    """An equation as a product with a matrix.

    Attributes:
        x: Indices of the activation.
        w: Indices of the weight.
        y: Indices of the result.
    """

    x: str
    w: str
    y: str

    @property
    def m(self) -> str:
        """Indices of rows, in the order of the activation."""
        return "".join(c for c in self.x if c not in self.w)

    @property
    def k(self) -> str:
        """Indices that are summed over, in the order of the activation."""
        return "".join(c for c in self.x if c in self.w)

    @property
    def n(self) -> str:
        """Indices of columns, in the order of the result, so that it needs no transposition where possible."""
        return "".join(c for c in self.y if c in self.w)


def einsum_to_matmul(graph: gs.Graph, names: FreshNames) -> int:
    """Rewrite every Einsum that is a product with a constant matrix; return how many."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "Einsum" or node.domain or len(node.inputs) != 2:
            continue
        constants = [weight_of(tensor) for tensor in node.inputs]
        if (constants[0] is None) == (constants[1] is None):
            continue
        right = 1 if constants[1] is not None else 0
        product = _parse(str(node.attrs["equation"]), right)
        weight = constants[right]
        assert weight is not None
        if product is not None and len(weight.shape) == len(product.w):
            _rewrite(graph, names, node, (product, weight, right))
            count += 1
    return count


def _parse(equation: str, right: int) -> Product | None:
    """Return the equation as a product whose weight is operand ``right``; None when it is something else."""
    left, arrow, result = equation.replace(" ", "").replace("...", ELLIPSIS).partition("->")
    operands = left.split(",")
    if len(operands) != 2:
        return None
    if not arrow:
        once = sorted(c for c in set(left) if left.count(c) == 1 and c.isalpha())
        result = (ELLIPSIS if ELLIPSIS in left else "") + "".join(once)
    x, w = operands[1 - right], operands[right]
    found = Product(x, w, result)
    repeated = any(len(set(text)) != len(text) for text in (x, w, result))
    dots = ELLIPSIS in w or any(ELLIPSIS in text[1:] for text in (x, result)) or (ELLIPSIS in x) != (ELLIPSIS in result)
    batched = any(c in x and c in result for c in w)
    summed = any(c not in result for c in found.m) or any(c not in result and c not in x for c in w)
    if repeated or dots or batched or summed or not found.k or not set(result) <= set(x + w):
        return None
    # Axes behind an ellipsis have no numbers; they can stay where they are, but not be moved.
    return (
        None if ELLIPSIS in x and (found.m + found.k != x or found.m + found.n != result or len(found.k) > 1) else found
    )


def _rewrite(graph: gs.Graph, names: FreshNames, node: gs.Node, found: tuple[Product, Weight, int]) -> None:
    product, weight, right = found
    sizes = dict(zip(product.w, weight.shape, strict=True))
    x, w = node.inputs[1 - right], node.inputs[right]
    columns = [sizes[c] for c in product.n]
    chain = _Chain(graph, names, node.name)
    w = chain.transposed(w, product.w, product.k + product.n)
    w = chain.reshaped(w, [math.prod(sizes[c] for c in product.k), math.prod(columns)], len(product.w) != 2)
    x = chain.transposed(x, product.x, product.m + product.k)
    x = chain.reshaped(x, [*[0] * len(product.m), -1], len(product.k) != 1)
    result = node.outputs[0]
    node.op, node.attrs = "MatMul", {}
    node.inputs.clear()
    node.inputs.extend([x, w])
    steps = len(product.n) != 1 or product.m + product.n != product.y
    if steps:
        node.outputs[0] = gs.Variable(names(f"{result.name}_product"), dtype=result.dtype)
        last = chain.reshaped(node.outputs[0], [*[0] * len(product.m), *columns], len(product.n) != 1)
        last = chain.transposed(last, product.m + product.n, product.y)
        last.inputs[0].outputs[0] = result


@dataclass(frozen=True, slots=True)
class _Chain:
    """Adds layout operators to a graph."""

    graph: gs.Graph
    names: FreshNames
    base: str

    def transposed(self, tensor: gs.Tensor, now: str, then: str) -> gs.Tensor:
        if now == then:
            return tensor
        return self._add("Transpose", [tensor], {"perm": [now.index(c) for c in then]})

    def reshaped(self, tensor: gs.Tensor, shape: list[int], needed: bool) -> gs.Tensor:
        if not needed:
            return tensor
        target = constant(self.names(f"{self.base}_shape"), np.asarray(shape, np.int64))
        return self._add("Reshape", [tensor, target], {})

    def _add(self, op: str, inputs: list[gs.Tensor], attrs: dict[str, object]) -> gs.Tensor:
        name = self.names(f"{self.base}_{op}")
        output = gs.Variable(self.names(f"{name}_output"), dtype=inputs[0].dtype)
        self.graph.nodes.append(gs.Node(op=op, name=name, attrs=attrs, inputs=inputs, outputs=[output]))
        return output
