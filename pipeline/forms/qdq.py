"""Standard ONNX: QuantizeLinear and DequantizeLinear around float operators, which a runtime fuses.

Names are those that users of ONNX Runtime and Netron expect: ``<tensor>_QuantizeLinear``, ``<tensor>_scale``,
``<tensor>_zero_point``.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ...calibrate.formats import FORMATS
from ...calibrate.qarray import QArray, QParams, Spec, quantize
from ..constants import weight_of
from ..graph import values
from ..plan import Decision
from ..precision import HALVES
from . import FORMS, Workbench
from .bias import move_bias_behind, settle_bias


@FORMS.register("qdq")
def insert_qdq(bench: Workbench, node: gs.Node, decisions: list[Decision]) -> None:
    """Put Q/DQ pairs on the activations of ``node``, and a DequantizeLinear behind its codes of weights."""
    bias_fits = settle_bias(bench, node, decisions)
    for decision in decisions:
        role, site = decision.site.role, decision.site
        if decision.spec is None:
            continue
        if role == "activation":
            node.inputs[site.index] = dequantized(bench, node.inputs[site.index], (site.tensor, decision.spec))
        elif role == "weight":
            node.inputs[site.index] = dequantized_weight(bench, node, site.index, bench.weights[site])
        elif role == "output":
            key = (site.tensor, decision.spec)
            dequantized(bench, node.outputs[site.index], key, everyone=True)
            _absorb(bench, node, bench.activations[key])
    if not bias_fits:
        weight = next(d.site for d in decisions if d.site.role == "weight")
        move_bias_behind(bench, node, bench.weights[weight].q.ndim)


def dequantized(bench: Workbench, tensor: gs.Tensor, key: tuple[str, Spec], *, everyone: bool = False) -> gs.Tensor:
    """Return the float tensor behind the Q/DQ pair of an activation; the pair is made once.

    Args:
        bench: The graph under work.
        tensor: Float tensor of any shape; not looked at when the pair is there already. A constant is stored as codes.
        key: Name of the tensor in the float graph, and its spec.
        everyone: All readers of ``tensor``, the graph's outputs included, read the result: an integer kernel with a
            quantizer behind it must have no other reader.
    """
    made = ("activation", *key)
    if made in bench.made:
        return bench.made[made]
    params, name = bench.activations[key], key[0]
    constant = weight_of(tensor)
    if constant is not None:
        codes = quantize(np.asarray(constant.values(), dtype=np.float32), params)
        bench.made[made] = _stored(bench, made, tensor, codes)
        return bench.made[made]
    readers = list(tensor.outputs)
    result = bench.made[made] = _pair(bench, tensor, name, params)
    if everyone:
        _redirect(bench, tensor, result, readers)
    return result


def _pair(bench: Workbench, tensor: gs.Tensor, name: str, params: QParams) -> gs.Tensor:
    """Quantize and dequantize a tensor, and return the result."""
    scale, zero = _scale_constants(bench, name, params)
    quantized = bench.variable(f"{name}_QuantizeLinear_Output")
    result = bench.variable(f"{name}_DequantizeLinear_Output", tensor)
    bench.node("QuantizeLinear", f"{name}_QuantizeLinear", [tensor, scale, zero], quantized)
    bench.node("DequantizeLinear", f"{name}_DequantizeLinear", [quantized, scale, zero], result)
    return result


def dequantized_weight(bench: Workbench, node: gs.Node, slot: int, qarray: QArray) -> gs.Tensor:
    """Return the DequantizeLinear output that stands for the weight at ``node.inputs[slot]``; made once per codes."""
    weight = weight_of(node.inputs[slot])
    assert weight is not None
    key = ("weight", weight.key, qarray.params.spec, id(qarray))
    if key not in bench.made:
        bench.made[key] = _stored(bench, key, node.inputs[slot], qarray)
    return bench.made[key]


def _stored(bench: Workbench, key: tuple[object, ...], real: gs.Tensor, qarray: QArray) -> gs.Tensor:
    """Return the output of a DequantizeLinear behind the stored codes of a constant; ``key`` stands for the codes."""
    name, fmt = real.name, qarray.params.spec.format
    codes = bench.shared_constant(("codes", *key), f"{name}_quantized", qarray.q, fmt.onnx_type)
    attrs = _axis_attributes(qarray)
    if fmt.scale_format in bench.scale_formats:
        rest = [_scale_codes(bench, name, qarray.params)]
        if fmt.scale_levels == 1:
            attrs["output_dtype"] = onnx.TensorProto.FLOAT  # else it would be the type of the scale
    else:
        rest = list(_scale_constants(bench, name, qarray.params))
    result = bench.variable(f"{name}_DequantizeLinear_Output", real)
    bench.node("DequantizeLinear", f"{name}_DequantizeLinear", [codes, *rest], result, attrs)
    return result


def _scale_codes(bench: Workbench, name: str, params: QParams) -> gs.Tensor:
    """Return the scales of blocks in their own format of 8 bits, real again behind a DequantizeLinear of two levels."""
    fmt, key = params.spec.format, (name, params.spec, params.scale.tobytes())
    stored = FORMATS.get(fmt.scale_format)
    if fmt.scale_levels == 1:  # what the scale is, exactly
        return bench.shared_constant(
            ("scale codes", *key), f"{name}_scale", params.scale.astype(stored.dtype), stored.onnx_type
        )
    assert params.scale_codes is not None
    codes, outer = params.scale_codes.q, params.scale_codes.params.scale
    inputs: list[gs.Tensor] = [
        bench.shared_constant(("scale codes", *key), f"{name}_scale_quantized", codes, stored.onnx_type),
        bench.shared_constant(("outer scale", *key), f"{name}_scale_scale", outer, "FLOAT"),
    ]
    result = gs.Variable(bench.fresh(f"{name}_scale"), dtype=np.float32, shape=list(codes.shape))
    bench.node("DequantizeLinear", f"{name}_scale_DequantizeLinear", inputs, result)
    return result


def _absorb(bench: Workbench, node: gs.Node, params: QParams) -> None:
    """Take a Relu or Clip out from before its quantizer when the codes end where it cuts: rounding is monotonic.

    What is smaller than the lower limit then gets the lowest code with and without it, and so at the upper end. Where
    the codes end elsewhere, a pair with the same scale stands before it too, so that the product has its quantizer.
    """
    if node.op not in ("Relu", "Clip"):
        return
    limits, spec = _limits(node), params.spec
    if limits is not None and spec.format.is_integer:
        ends = quantize(np.asarray(limits, dtype=np.float32), params).q.astype(np.float64)
        if ends[0] == spec.qmin and ends[1] == spec.qmax:
            for reader in list(node.outputs[0].outputs):
                reader.inputs[0] = node.inputs[0]
            return
    if not bench.fuses_relu:
        node.inputs[0] = _pair(bench, node.inputs[0], node.inputs[0].name, params)


def _limits(node: gs.Node) -> tuple[float, float] | None:
    """Return where a Relu or Clip cuts; None when that is only known at run time."""
    if node.op == "Relu":
        return 0.0, np.inf
    limits = [float(node.attrs.get("min", -np.inf)), float(node.attrs.get("max", np.inf))]  # attributes before opset 11
    for index, tensor in enumerate(node.inputs[1:3]):
        if isinstance(tensor, gs.Constant):
            limits[index] = float(values(tensor).reshape(()))
        elif not tensor.is_empty():
            return None
    return limits[0], limits[1]


def _scale_constants(bench: Workbench, name: str, params: QParams) -> tuple[gs.Constant, gs.Constant]:
    """Return scale and zero point; the scale has the type that DequantizeLinear is to give."""
    spec = params.spec
    blocked = spec.granularity.block_size > 0
    scale = params.scale if blocked else params.scale.reshape(() if spec.granularity.axis is None else (-1,))
    zero = np.zeros(scale.shape, spec.format.dtype) if params.zero_point is None else params.zero_point
    # float32 holds scales of 8 bits exactly, and more runtimes take it.
    scale_type = FORMATS.get(spec.format.scale_format if spec.format.scale_format in HALVES else "float32").onnx_type
    key = (name, spec, scale.tobytes(), zero.tobytes())
    return (
        bench.shared_constant(("scale", *key), f"{name}_scale", scale, scale_type),
        bench.shared_constant(("zero", *key), f"{name}_zero_point", zero.reshape(scale.shape), spec.format.onnx_type),
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
    for i, entry in enumerate(bench.scope.outputs):
        if entry is tensor:  # The output keeps its name and type; what feeds the quantizer is renamed.
            public = tensor.name
            tensor.name = bench.fresh(f"{public}_QuantizeLinear_Input")
            result.name, result.dtype, result.shape = public, tensor.dtype, tensor.shape
            bench.scope.outputs[i] = result
