"""Standard ONNX: QuantizeLinear and DequantizeLinear around float operators, which a runtime fuses.

Names are those that users of ONNX Runtime and Netron expect: ``<tensor>_QuantizeLinear``, ``<tensor>_scale``,
``<tensor>_zero_point``.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ...calibrate.qarray import QArray, QParams, Spec
from ..constants import weight_of
from ..plan import Decision
from . import FORMS, Workbench


@FORMS.register("qdq")
def insert_qdq(bench: Workbench, node: gs.Node, decisions: list[Decision]) -> None:
    """Put Q/DQ pairs on the activations of ``node``, and a DequantizeLinear behind its codes of weights."""
    for decision in decisions:
        role, site = decision.site.role, decision.site
        if role == "activation" and decision.spec is not None:
            node.inputs[site.index] = dequantized(bench, node.inputs[site.index], (site.tensor, decision.spec))
        elif role == "output" and decision.spec is not None:
            dequantized(bench, node.outputs[site.index], (site.tensor, decision.spec), everyone=True)
        elif role == "weight" and decision.spec is not None:
            node.inputs[site.index] = dequantized_weight(bench, node, site.index, bench.weights[site])
    by_role = {d.site.role: d for d in decisions}
    if "bias" in by_role and by_role["bias"].form == "int32":
        data, weight = by_role["activation"], by_role["weight"]
        assert data.spec is not None
        data_params = bench.activations[data.site.tensor, data.spec]
        _insert_bias(bench, node, by_role["bias"].site.index, data_params, bench.weights[weight.site].params)


def dequantized(bench: Workbench, tensor: gs.Tensor, key: tuple[str, Spec], *, everyone: bool = False) -> gs.Tensor:
    """Return the float tensor behind the Q/DQ pair of an activation; the pair is made once.

    Args:
        bench: The graph under work.
        tensor: Float tensor of any shape; not looked at when the pair is there already.
        key: Name of the tensor in the float graph, and its spec.
        everyone: All readers of ``tensor``, the graph's outputs included, read the result: an integer kernel with a
            quantizer behind it must have no other reader.
    """
    made = ("activation", *key)
    if made in bench.made:
        return bench.made[made]
    name, readers = key[0], list(tensor.outputs)
    scale, zero = _scale_constants(bench, name, bench.activations[key])
    quantized = bench.variable(f"{name}_QuantizeLinear_Output")
    result = bench.variable(f"{name}_DequantizeLinear_Output", tensor)
    bench.node("QuantizeLinear", f"{name}_QuantizeLinear", [tensor, scale, zero], quantized)
    bench.node("DequantizeLinear", f"{name}_DequantizeLinear", [quantized, scale, zero], result)
    bench.made[made] = result
    if everyone:
        _redirect(bench, tensor, result, readers)
    return result


def dequantized_weight(bench: Workbench, node: gs.Node, slot: int, qarray: QArray) -> gs.Tensor:
    """Return the DequantizeLinear output that stands for the weight at ``node.inputs[slot]``; made once per codes."""
    weight = weight_of(node.inputs[slot])
    assert weight is not None
    name = node.inputs[slot].name
    key = ("weight", weight.key, qarray.params.spec, id(qarray))
    if key not in bench.made:
        codes = bench.constant(f"{name}_quantized", qarray.q, qarray.params.spec.format.onnx_type)
        scale, zero = _scale_constants(bench, name, qarray.params)
        result = bench.variable(f"{name}_DequantizeLinear_Output", node.inputs[slot])
        attrs = _axis_attributes(qarray)
        bench.node("DequantizeLinear", f"{name}_DequantizeLinear", [codes, scale, zero], result, attrs)
        bench.made[key] = result
    return bench.made[key]


def _insert_bias(bench: Workbench, node: gs.Node, slot: int, data: QParams, weight: QParams) -> None:
    """Store a bias [out] as int32 with scale s_x * s_w, unless that would overflow or underflow."""
    bias = weight_of(node.inputs[slot])
    if bias is None or len(bias.shape) != 1:
        return
    real = bias.values().astype(np.float64)
    scale = np.broadcast_to((data.scale * weight.scale.reshape(-1)).astype(np.float32), real.shape)
    codes = np.rint(real / scale.astype(np.float64))
    if scale.min(initial=np.inf) < np.finfo(np.float32).tiny or np.abs(codes).max(initial=0) >= 2**31 - 1:
        return  # A float bias is exact; the kernel it costs is cheaper than a wrong sum.
    name = node.inputs[slot].name
    result = bench.variable(f"{name}_DequantizeLinear_Output", node.inputs[slot])
    integers = bench.constant(f"{name}_quantized", codes.astype(np.int32), "INT32")
    scales = bench.constant(f"{name}_scale", np.ascontiguousarray(scale), "FLOAT")
    bench.node("DequantizeLinear", f"{name}_DequantizeLinear", [integers, scales], result, {"axis": 0})
    node.inputs[slot] = result


def _scale_constants(bench: Workbench, name: str, params: QParams) -> tuple[gs.Constant, gs.Constant]:
    spec = params.spec
    blocked = spec.granularity.block_size > 0
    scale = params.scale if blocked else params.scale.reshape(() if spec.granularity.axis is None else (-1,))
    zero = np.zeros(scale.shape, spec.format.dtype) if params.zero_point is None else params.zero_point
    return (
        bench.constant(f"{name}_scale", scale, "FLOAT"),
        bench.constant(f"{name}_zero_point", zero.reshape(scale.shape), spec.format.onnx_type),
    )


def _axis_attributes(qarray: QArray) -> dict[str, int]:
    granularity = qarray.params.spec.granularity
    if granularity.axis is None:
        return {}
    attrs = {"axis": granularity.axis}
    return {**attrs, "block_size": granularity.block_size} if granularity.block_size else attrs


def _redirect(bench: Workbench, tensor: gs.Tensor, result: gs.Tensor, readers: list[gs.Node]) -> None:
    for reader in readers:
        for i, entry in enumerate(reader.inputs):
            if entry is tensor:
                reader.inputs[i] = result
    for i, entry in enumerate(bench.graph.outputs):
        if entry is tensor:  # The output keeps its name and type; what feeds the quantizer is renamed.
            public = tensor.name
            tensor.name = bench.fresh(f"{public}_QuantizeLinear_Input")
            result.name, result.dtype, result.shape = public, tensor.dtype, tensor.shape
            bench.graph.outputs[i] = result
