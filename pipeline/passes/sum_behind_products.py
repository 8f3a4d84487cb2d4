"""What is added to an integer product is kept from being fused with it by ONNX Runtime.

Its optimizer makes one Gemm of ``MatMul -> Add`` where both are matrices, a bias or another activation alike, before it
looks for quantizers; and a Gemm whose addend is no int32 computes in float, behind DequantizeLinear of its weight,
slower than the float model. It leaves Sum alone, which computes the same of two operands.

Source: ONNX operator Sum; ONNX Runtime 1.31, MatMulAddFusion and its optimized graphs.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ..constants import dtype_name
from ..fresh import FreshNames

_MATRIX = 2


def sum_behind_products(graph: gs.Graph, names: FreshNames) -> int:  # noqa: ARG001 - protocol
    """What is added to products of matrices is added by Sum: with Add they become a float Gemm; return how many."""
    outputs = {id(tensor) for tensor in graph.outputs}
    count = 0
    for node in graph.nodes:
        if node.op == "MatMul" and not node.domain and all(_is_dequantized(tensor) for tensor in node.inputs):
            product = node.outputs[0]
            adder = product.outputs[0] if len(product.outputs) == 1 and id(product) not in outputs else None
            if adder is not None and adder.op == "Add" and not adder.domain and _may_be_matrix(product):
                adder.op = "Sum"
                count += 1
    return count


def _is_dequantized(tensor: gs.Tensor) -> bool:
    return bool(tensor.inputs) and tensor.inputs[0].op == "DequantizeLinear"


def _may_be_matrix(tensor: gs.Tensor) -> bool:
    return dtype_name(tensor) in ("float32", "") and (tensor.shape is None or len(tensor.shape) == _MATRIX)
