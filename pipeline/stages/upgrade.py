"""Upgrade: a model below opset 13 becomes one that can carry scales per channel."""

from __future__ import annotations

import onnx

from ...calibrate.errors import UnsupportedError
from ..graph import Model, from_proto, to_proto

UPGRADE_OPSET = 17
_INITIALIZERS_FREE_IR = 4


def upgrade(model: Model, opset: int = UPGRADE_OPSET) -> Model:
    """Return ``model`` converted to ``opset`` by ONNX's own version converter; newer models come back unchanged.

    Raises:
        UnsupportedError: The converter knows no way for one of the operators.
    """
    if model.opset >= 13:
        return model
    proto = to_proto(model)
    _list_weights_as_inputs(proto)
    try:
        converted = onnx.version_converter.convert_version(proto, opset)
    except (RuntimeError, ValueError) as error:
        raise UnsupportedError(
            f"the model cannot be upgraded from opset {model.opset} to {opset}",
            where=str(model.path or "model in memory"),
            found=str(error).splitlines()[0],
            do="export it again at opset 13 or newer",
        ) from error
    _drop_weights_from_inputs(converted)
    converted.ir_version = max(converted.ir_version, 8)
    result = from_proto(converted)
    result.path = model.path
    return result


def _list_weights_as_inputs(proto: onnx.ModelProto) -> None:
    """The converter of old opsets finds a weight only among the inputs, as IR version 3 had it."""
    known = {value.name for value in proto.graph.input}
    for tensor in proto.graph.initializer:
        if tensor.name not in known:
            proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    proto.ir_version = min(proto.ir_version, _INITIALIZERS_FREE_IR - 1)


def _drop_weights_from_inputs(proto: onnx.ModelProto) -> None:
    weights = {tensor.name for tensor in proto.graph.initializer}
    kept = [value for value in proto.graph.input if value.name not in weights]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
