"""What forms that replace an operator share: its quantized weight as a matrix, and its bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...calibrate.qarray import Spec
from ..constants import weight_of
from ..layouts import layout_of
from ..plan import Decision
from . import Workbench

Array = npt.NDArray[Any]
MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A quantized weight.

    Attributes:
        name: Name of its tensor in the float graph.
        spec: How it is stored.
        codes: [out, in].
        scale: [out, 1] per output channel, [out, blocks] in blocks along the input, [] for one scale.
        zero: Zero points in the shape of the scales, None where there is none.
        key: Stands for the codes, to make constants of them once.
    """

    name: str
    spec: Spec
    codes: Array
    scale: Array
    zero: Array | None
    key: tuple[object, ...]


def stored_weight(bench: Workbench, node: gs.Node, decisions: Sequence[Decision]) -> Stored:
    """Return the quantized weight of a node."""
    decision = next(d for d in decisions if d.site.role == "weight")
    tensor = node.inputs[decision.site.index]
    weight, qarray = weight_of(tensor), bench.weights[decision.site]
    assert weight is not None
    layout, params = layout_of(node, weight.shape), qarray.params

    def matrix(values: Array) -> Array:
        return values if values.ndim == 0 else layout.matrix(values)

    return Stored(
        name=tensor.name,
        spec=params.spec,
        codes=matrix(qarray.q),
        scale=matrix(params.scale),
        zero=None if params.zero_point is None else matrix(params.zero_point),
        key=(weight.key, params.spec, id(qarray), layout),
    )


def bias_of(node: gs.Node) -> gs.Tensor | None:
    """Return the bias that a Gemm adds to its product."""
    has_bias = node.op == "Gemm" and len(node.inputs) > 2 and not node.inputs[2].is_empty()
    return node.inputs[2] if has_bias else None


def replace_product(bench: Workbench, node: gs.Node, op: str, inputs: list[gs.Tensor], attrs: dict[str, Any]) -> None:
    """Turn a MatMul or Gemm into an operator of ONNX Runtime; the bias of a Gemm is added behind it.

    The operator keeps name and result, so that patterns and reports still find it.
    """
    bias, output, base = bias_of(node), node.outputs[0], node.name or node.outputs[0].name
    vars(node).pop("origin", None)
    node.op, node.domain, node.inputs, node.attrs = op, MICROSOFT, inputs, attrs
    if bias is not None:
        product = bench.variable(f"{base}_without_bias", output)
        node.outputs = [product]
        bench.node("Add", f"{base}_bias_add", [product, bias], output)
