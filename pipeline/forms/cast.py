"""The float remainder in half precision: operators in float16 or bfloat16, casts where types meet.

Unlike other forms this one is carried out after all of them, over the whole graph at once: what stays in float32 next
to what does not decides where casts stand. Quantizers and dequantizers go with their neighbours, as long as their
scales are normal numbers of the type.

Source: ONNX operator Cast, and the type constraints of each operator.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from ...calibrate.formats import FORMATS
from ..constants import dtype_name
from ..graph import values
from ..plan import Plan
from ..precision import retype


def narrow(graph: gs.Graph, plan: Plan, border: Mapping[str, str], *, half_scales: bool) -> None:
    """Convert the nodes that a plan stores in half precision; ``graph`` is changed in place.

    Args:
        graph: The main graph, all other forms inserted.
        plan: Its decisions of the form ``cast``.
        border: Types that inputs and outputs of the graph get, by name.
        half_scales: Whether quantizers and dequantizers may have scales in half precision.
    """
    kinds = {d.site.node: d.spec.format.name for d in plan.quantized() if d.form == "cast" and d.spec is not None}

    def colour(node: gs.Node) -> str | None:
        if node.name in kinds:
            return kinds[node.name]
        if node.op not in ("QuantizeLinear", "DequantizeLinear") or not half_scales:
            return None
        if dtype_name(node.inputs[0]) == "int32":
            return None  # The scale of a bias is a product, which half precision would round.
        # A pair has one scale, so it goes as a whole with the operators that read it.
        behind = {colour(reader) for reader in node.outputs[0].outputs}
        kind = behind.pop() if len(behind) == 1 else None
        return kind if kind is not None and _is_normal(node.inputs[1], kind) else None

    retype(graph, colour, border)


def _is_normal(scale: gs.Tensor, kind: str) -> bool:
    """Whether all scales are normal numbers of a type: others would lose bits, or become zero."""
    if not isinstance(scale, gs.Constant):
        return False
    info = ml_dtypes.finfo(FORMATS.get(kind).dtype)  # type: ignore[no-untyped-call]
    found = np.asarray(values(scale), dtype=np.float32)
    return bool((found >= float(info.smallest_normal)).all() and (found <= float(info.max)).all())
