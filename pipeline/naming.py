"""Readable names for exported graphs.

The torch exporter calls nodes ``node_MatMul_95`` and folded weights ``val_96``. Users pick layers by name and read them
in reports, so nodes are called after the module they come from (``encoder.layer.0.attention.self.query/MatMul``),
tensors after their node, and a weight that the exporter transposed ``<parameter>.T``.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx_ir

_SCOPES = "pkg.torch.onnx.name_scopes"


def name_after_modules(model: onnx_ir.Model, parameters: Mapping[str, npt.NDArray[Any]]) -> None:
    """Rename nodes, intermediate tensors and folded weights of ``model`` in place.

    Args:
        model: As torch.onnx exported it, with its metadata.
        parameters: Name -> values [out, in] of the module's two-dimensional parameters.
    """
    _name_weights(model.graph, parameters)
    outputs = set(model.graph.outputs)
    counts: Counter[str] = Counter()
    for node in model.graph:
        scope = _scope(node)
        base = f"{scope}/{node.op_type}" if scope else node.op_type
        node.name = f"{base}_{counts[base]}" if counts[base] else base
        counts[base] += 1
        for i, value in enumerate(node.outputs):
            if value not in outputs and value.name:
                value.name = f"{node.name}_output_{i}"


def _scope(node: onnx_ir.Node) -> str:
    scopes = [
        s for s in ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))[:-1] if s and not s.startswith("_empty")
    ]
    return str(scopes[-1]) if scopes else ""


def _name_weights(graph: onnx_ir.Graph, parameters: Mapping[str, npt.NDArray[Any]]) -> None:
    """Name a transposed weight after the parameter that it came from, found by its values."""
    by_shape: dict[tuple[int, ...], list[tuple[str, npt.NDArray[Any]]]] = {}
    for name, array in parameters.items():
        by_shape.setdefault(array.shape[::-1], []).append((name, array))
    for value in [v for v in graph.initializers.values() if v.name not in parameters]:
        if value.const_value is None or len(value.const_value.shape) != 2:
            continue
        candidates = by_shape.get(tuple(value.const_value.shape.numpy()), [])
        array = value.const_value.numpy() if candidates else None
        source = next((name for name, known in candidates if np.array_equal(known.T, array)), None)
        if source is not None and f"{source}.T" not in graph.initializers:
            del graph.initializers[value.name]
            value.name = f"{source}.T"
            graph.initializers[value.name] = value
