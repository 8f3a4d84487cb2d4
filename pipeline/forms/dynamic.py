"""Scales found at run time: DynamicQuantizeLinear, MatMulInteger, Cast, Mul.

``y = (x_codes - x_zero) @ w_codes * (x_scale * w_scale) + bias``. ONNX Runtime fuses exactly this shape: one product
behind a quantizer becomes DynamicQuantizeMatMul, several that share one become MatMulIntegerToFloat; the bias goes
along. One quantizer serves all products of a tensor. MatMulInteger saturates on x86 CPUs without VNNI even with all
optimizations off, which is why weights of such targets have a pair limit.

Names are those of ONNX Runtime's own tools: ``<tensor>_QuantizeLinear``, ``<node>_quant``.

Source: ONNX operators DynamicQuantizeLinear and MatMulInteger.
"""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from ..plan import Decision
from . import FORMS, Workbench
from .stored import Stored, bias_of, stored_weight


@FORMS.register("dynamic")
def insert_dynamic(bench: Workbench, node: gs.Node, decisions: list[Decision]) -> None:
    """Replace a MatMul or Gemm by a product of integers between quantizer and scales."""
    codes, scale, zero = quantized_at_run_time(bench, node.inputs[0])
    weight_codes, weight_scale, weight_zero = _constants(bench, stored_weight(bench, node, decisions))
    bias, output, base = bias_of(node), node.outputs[0], node.name or node.outputs[0].name
    node.outputs.clear()
    product, real, scales = (bench.variable(f"{base}_{what}") for what in ("integer", "float", "scales"))
    bench.node("MatMulInteger", f"{base}_quant", [codes, weight_codes, zero, *weight_zero], product)
    bench.node("Cast", f"{base}_quant_cast", [product], real, {"to": onnx.TensorProto.FLOAT})
    bench.node("Mul", f"{base}_quant_scales_mul", [scale, weight_scale], scales)
    scaled = output if bias is None else bench.variable(f"{base}_without_bias", output)
    bench.node("Mul", f"{base}_quant_output_scale_mul", [real, scales], scaled)
    if bias is not None:
        bench.node("Add", f"{base}_bias_add", [scaled, bias], output)


def quantized_at_run_time(bench: Workbench, tensor: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor]:
    """Return codes, scale and zero point of an activation; its quantizer is made once."""
    keys = [("dynamic", tensor.name, part) for part in ("quantized", "scale", "zero_point")]
    if keys[0] not in bench.made:
        for key in keys:
            bench.made[key] = bench.variable(f"{tensor.name}_{key[2]}")
        outputs = [bench.made[key] for key in keys]
        name = bench.fresh(f"{tensor.name}_QuantizeLinear")
        bench.scope.nodes.append(gs.Node(op="DynamicQuantizeLinear", name=name, inputs=[tensor], outputs=outputs))
    codes, scale, zero = (bench.made[key] for key in keys)
    return codes, scale, zero


def _constants(bench: Workbench, weight: Stored) -> tuple[gs.Constant, gs.Constant, list[gs.Constant]]:
    """Return codes [in, out], scales [out] or [], and a list of one zero point, empty when it is 0."""
    name, onnx_type, shape = weight.name, weight.spec.format.onnx_type, () if weight.scale.ndim == 0 else (-1,)
    codes = bench.shared_constant(("dynamic", "codes", *weight.key), f"{name}_quantized", weight.codes.T, onnx_type)
    scale = weight.scale.reshape(shape)
    scales = bench.shared_constant(("dynamic", "scale", *weight.key), f"{name}_scale", scale, "FLOAT")
    if weight.zero is None:
        return codes, scales, []
    zero = weight.zero.reshape(shape)
    zeros = bench.shared_constant(("dynamic", "zero", *weight.key), f"{name}_zero_point", zero, onnx_type)
    return codes, scales, [zeros]
