"""Which files the installed ONNX Runtime runs, found by giving it models of one or two nodes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import onnx
from onnx import TensorProto, helper

from ..calibrate.errors import ModelError
from .session import NO_PLUGIN, make_session

FIRST_OPSET = {
    "INT8": 13,
    "UINT8": 13,
    "INT16": 21,
    "UINT16": 21,
    "INT4": 21,
    "UINT4": 21,
    "INT2": 25,
    "UINT2": 25,
    "FLOAT8E4M3FN": 19,
    "FLOAT8E5M2": 19,
    "FLOAT4E2M1": 23,
}
"""First opset whose DequantizeLinear takes the type (per axis, hence 13 for 8 bits). Source: ONNX DequantizeLinear."""

LOWEST_IR = 3
COMMON_IR = 10
"""An IR version that every supported runtime reads, so that the opset alone decides."""


@functools.cache
def measure() -> dict[str, Any]:
    """Return what the installed ONNX Runtime runs on the CPU.

    Returns:
        ``max_opset`` (models load), ``max_qdq_opset`` (Q/DQ have kernels), ``max_ir_version``, and ``types``: which
        types of codes a DequantizeLinear takes.
    """
    known = onnx.defs.onnx_opset_version()
    return {
        "max_opset": _highest(known, 7, lambda version: opens(_model(_relu(), opset=version))),
        "max_qdq_opset": _highest(known, 10, lambda version: opens(_model(_pair(), opset=version))),
        "max_ir_version": _highest(
            int(onnx.IR_VERSION), LOWEST_IR, lambda version: opens(_model(_relu(), opset=7, ir_version=version))
        ),
        "types": {name: _runs_type(name, first) for name, first in FIRST_OPSET.items()},
    }


def opens(model: onnx.ModelProto) -> bool:
    """Whether a session opens on ``model``."""
    try:
        make_session(model, exact=True, threads=1, extras=NO_PLUGIN)
    except ModelError:
        return False
    return True


def _highest(top: int, bottom: int, works: Callable[[int], bool]) -> int | None:
    return next((version for version in range(top, bottom - 1, -1) if works(version)), None)


def _runs_type(name: str, first: int) -> bool:
    number = TensorProto.DataType.Value(name)
    return first <= onnx.defs.onnx_opset_version() and opens(_model(_dequantize(number), opset=first))


def _model(graph: onnx.GraphProto, *, opset: int, ir_version: int = COMMON_IR) -> onnx.ModelProto:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def _relu() -> onnx.GraphProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    return helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])


def _pair() -> onnx.GraphProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"]),
    ]
    return helper.make_graph(nodes, "pair", [x], [y], [helper.make_tensor("s", TensorProto.FLOAT, [], [1.0])])


def _dequantize(number: int) -> onnx.GraphProto:
    q = helper.make_tensor_value_info("q", number, [2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    scale = helper.make_tensor("s", TensorProto.FLOAT, [], [1.0])
    return helper.make_graph([helper.make_node("DequantizeLinear", ["q", "s"], ["y"])], "dq", [q], [y], [scale])
