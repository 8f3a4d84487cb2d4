"""ONNX Runtime's Attention holds a weight; taken apart, its product is a MatMul, which has an integer kernel.

    Attention (x, w, bias, mask) = MultiHeadAttention (q, k, v, bias, mask), where q, k, v = Split (MatMul (x, w))

Both operators are computed by the same code; a mask of 2 or 3 axes means the same in both. One of 1 axis does not
always, and a past is laid out in another way: those stay. Without a bias ONNX Runtime's Attention crashes.

Source: ONNX Runtime, contrib operators Attention and MultiHeadAttention.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ..constants import weight_of
from ..fresh import FreshNames
from ..graph import constant

MICROSOFT = "com.microsoft"
_INPUTS = ("input", "weights", "bias", "mask_index", "past", "attention_bias", "past_sequence_length")
_KEPT = ("num_heads", "mask_filter_value", "scale", "unidirectional")
_SIZES_AS_INPUT = 13


def attention_to_matmul(graph: gs.Graph, names: FreshNames) -> int:
    """Take every Attention with a constant weight apart into a MatMul and what follows it; return how many."""
    count = 0
    for node in list(graph.nodes):
        if node.op == "Attention" and node.domain == MICROSOFT and (sizes := _sizes(node)):
            _take_apart(graph, names, node, sizes)
            count += 1
    return count


def _operands(node: gs.Node) -> dict[str, gs.Tensor]:
    return {name: tensor for name, tensor in zip(_INPUTS, node.inputs, strict=False) if not tensor.is_empty()}


def _sizes(node: gs.Node) -> list[int]:
    """Return how many columns of the weight are query, key and value; none where the node has to stay."""
    given = _operands(node)
    weight, mask = weight_of(node.inputs[1]), given.get("mask_index")
    is_masked = mask is None or (mask.shape is not None and len(mask.shape) in (2, 3))
    is_plain = not {"past", "past_sequence_length"} & set(given) and len(node.outputs) == 1
    others = any(node.attrs.get(name, 0) for name in ("do_rotary", "past_present_share_buffer"))
    if weight is None or len(weight.shape) != 2 or "bias" not in given or not is_masked or not is_plain or others:
        return []
    columns = weight.shape[1]
    sizes = [int(size) for size in node.attrs.get("qkv_hidden_sizes", [columns // 3] * 3)]
    return sizes if sum(sizes) == columns and len(sizes) == 3 else []


def _take_apart(graph: gs.Graph, names: FreshNames, node: gs.Node, sizes: list[int]) -> None:
    given, result, dtype = _operands(node), node.outputs[0], node.inputs[0].dtype
    product = gs.Variable(names(f"{node.name}_product"), dtype=dtype)
    parts: list[gs.Tensor] = [gs.Variable(names(f"{node.name}_{what}"), dtype=dtype) for what in ("q", "k", "v")]
    attended = [*parts, *(given.get(name, gs.Variable.empty()) for name in ("bias", "mask_index", "attention_bias"))]
    kept = {name: node.attrs[name] for name in _KEPT if name in node.attrs}
    split = gs.Node(op="Split", name=names(f"{node.name}_Split"), attrs={"axis": -1}, inputs=[product], outputs=parts)
    if int(graph.opset) >= _SIZES_AS_INPUT:
        split.inputs.append(constant(names(f"{split.name}_sizes"), np.asarray(sizes, np.int64)))
    else:
        split.attrs["split"] = sizes
    vars(node).pop("origin", None)
    node.op, node.domain, node.attrs = "MatMul", None, {}
    node.inputs, node.outputs = [given["input"], given["weights"]], [product]
    last = gs.Node(
        op="MultiHeadAttention",
        name=names(f"{node.name}_MultiHeadAttention"),
        domain=MICROSOFT,
        attrs=kept,
        inputs=attended,
        outputs=[result],
    )
    graph.nodes.extend([split, last])
