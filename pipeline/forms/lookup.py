"""Tables of embeddings as codes: the rows that are looked up become real, not the whole table.

``Gather(table)`` becomes ``Cast(Gather(codes)) * Gather(scales)`` with one scale per row: standard operators, exact,
and no runtime keeps a float copy. (A DequantizeLinear before the Gather would compute the whole table at every run.)
"""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from ..plan import Decision
from . import FORMS, Workbench
from .stored import stored_weight


@FORMS.register("lookup")
def insert_lookup(bench: Workbench, node: gs.Node, decisions: list[Decision]) -> None:
    """Replace a Gather of rows of a constant table."""
    table = stored_weight(bench, node, decisions)
    codes = bench.shared_constant(("lookup", "codes", *table.key), f"{table.name}_quantized", table.codes, "INT8")
    scales = bench.shared_constant(("lookup", "scale", *table.key), f"{table.name}_scale", table.scale, "FLOAT")
    places, output, base = node.inputs[1], node.outputs[0], node.name or node.outputs[0].name
    node.outputs.clear()
    found, scale, real = (bench.variable(f"{base}_{what}") for what in ("quantized", "scale", "float"))
    bench.node("Gather", f"{base}_quant", [codes, places], found, {"axis": 0})
    bench.node("Gather", f"{base}_quant_scale", [scales, places], scale, {"axis": 0})
    bench.node("Cast", f"{base}_quant_cast", [found], real, {"to": onnx.TensorProto.FLOAT})
    bench.node("Mul", f"{base}_quant_scale_mul", [real, scale], output)
