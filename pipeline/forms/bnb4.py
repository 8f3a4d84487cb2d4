"""``com.microsoft.MatMulBnb4``: weights as places in a codebook of 16 values (NF4, FP4), float activations.

Blocks run over the flattened weight [N, K]; with K a multiple of the block size they stay inside of rows.

Letters: ``N`` outputs, ``K`` inputs.
Source: ONNX Runtime, contrib operator MatMulBnb4; Dettmers et al. 2023, "QLoRA".
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ...calibrate.formats.codebook import BNB4_QUANT_TYPE, pack_bnb4
from ..plan import Decision
from . import FORMS, Workbench
from .stored import replace_product, stored_weight


@FORMS.register("bnb4")
def insert_bnb4(bench: Workbench, node: gs.Node, decisions: list[Decision]) -> None:
    """Replace a MatMul or Gemm by MatMulBnb4."""
    weight = stored_weight(bench, node, decisions)
    packed, amax = pack_bnb4(weight.codes), weight.scale.reshape(-1)
    codes = bench.shared_constant(("bnb4", "codes", *weight.key), f"{weight.name}_Bnb4", packed, "UINT8")
    scale = bench.shared_constant(("bnb4", "scale", *weight.key), f"{weight.name}_absmax", amax, "FLOAT")
    outputs, depth = weight.codes.shape
    attrs = {
        "K": depth,
        "N": outputs,
        "block_size": weight.spec.granularity.block_size,
        "quant_type": BNB4_QUANT_TYPE[weight.spec.format.name],
    }
    replace_product(bench, node, "MatMulBnb4", [node.inputs[0], codes, scale], attrs)
