"""Exported graphs get names that a user knows from the module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from quantizing import model, normal

ir = pytest.importorskip("onnx_ir")

from qpipe.pipeline.naming import name_after_modules  # noqa: E402


def named(scopes: list[list[str]], body: str, parameters: dict[str, Any], **weights: Any) -> Any:
    proto = model(body, **weights)
    for node, scope in zip(proto.graph.node, scopes, strict=True):
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=repr(scope))
    found = ir.from_proto(proto)
    name_after_modules(found, parameters)
    return ir.to_proto(found)


def test_nodes_and_tensors_are_called_after_their_module() -> None:
    w = normal(4, 4)
    result = named(
        [["", "encoder", "encoder.query", "linear"], ["", "encoder", "encoder.query", "add"], ["", "encoder", "tanh"]],
        "g (float[N,4] x) => (float[N,4] y) { a = MatMul(x, val_1)  b = Add(a, bias)  y = Tanh(b) }",
        {"encoder.query.weight": w.T, "bias": np.zeros(4, np.float32)},
        val_1=w,
        bias=np.zeros(4, np.float32),
    )
    assert [node.name for node in result.graph.node] == ["encoder.query/MatMul", "encoder.query/Add", "encoder/Tanh"]
    assert result.graph.node[0].output[0] == "encoder.query/MatMul_output_0"
    assert result.graph.node[0].input[1] == "encoder.query.weight.T"
    assert [output.name for output in result.graph.output] == ["y"]
    assert {tensor.name for tensor in result.graph.initializer} == {"encoder.query.weight.T", "bias"}


def test_names_are_unique_and_unknown_scopes_fall_back_to_the_operator() -> None:
    body = "g (float[N,4] x) => (float[N,4] y) { a = Tanh(x)  b = Tanh(a)  y = Tanh(b) }"
    result = named([["", "m", "t"], ["", "m", "t"], [""]], body, {})
    assert [node.name for node in result.graph.node] == ["m/Tanh", "m/Tanh_1", "Tanh"]


def test_a_folded_weight_of_other_values_keeps_its_name() -> None:
    body = "g (float[N,4] x) => (float[N,4] y) { y = MatMul(x, val_1) }"
    result = named([["", "m", "t"]], body, {"m.weight": normal(4, 4, seed=5)}, val_1=normal(4, 4))
    assert [tensor.name for tensor in result.graph.initializer] == ["val_1"]
