"""Which tensors of a float model and a quantized one belong together, and how to get at them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .graph import Model
from .graph.constants import FileValues
from .graph.exporter import skeleton
from .graph.protos import keyed_tensors, location_of, refer

FOLDER_KEY = "session.model_external_initializers_file_folder_path"

_PASSED_ON = frozenset({"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "DequantizeLinear"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A tensor that both models compute.

    Attributes:
        tensor: Its name in the float model.
        quantized: Name of the tensor that stands for it in the quantized model: the dequantized one where every
            reader takes that.
        node: Name of the node of the float model that computes it.
        op: That node's operator, and the Relu or Clip behind it that a quantizer took over.
        before: Names of the nearest tensors before it that both models compute.
    """

    tensor: str
    quantized: str
    node: str
    op: str
    before: tuple[str, ...]


def common_layers(float_model: Model, quantized: Model) -> list[Layer]:
    """Return the float tensors that both main graphs compute, in topological order.

    They are matched by name. Where a Relu or Clip of the float model was left to a quantizer, its result stands for
    what the quantizer gives.
    """
    theirs = {tensor.name: _as_read(tensor).name for node in quantized.graph.nodes for tensor in node.outputs}
    reach: dict[str, tuple[str, ...]] = {}
    layers = []
    for node in float_model.graph.nodes:
        before = tuple(dict.fromkeys(name for tensor in node.inputs for name in reach.get(tensor.name, ())))
        for tensor in node.outputs:
            if node.op == "Constant" or tensor.name not in theirs or not _may_be_float(tensor):
                reach[tensor.name] = before
                continue
            bound = _left_to_quantizer(tensor, theirs)
            shown, op = (bound.outputs[0].name, f"{node.op}, {bound.op}") if bound else (tensor.name, node.op)
            reach[tensor.name] = (shown,)
            layers.append(Layer(tensor=shown, quantized=theirs[tensor.name], node=node.name, op=op, before=before))
    return layers


def _left_to_quantizer(tensor: gs.Tensor, theirs: Mapping[str, str]) -> gs.Node | None:
    """Return the Relu or Clip that alone reads ``tensor`` and that the quantized model does not have."""
    is_quantized = theirs[tensor.name] != tensor.name
    only = tensor.outputs[0] if len(tensor.outputs) == 1 else None
    if not is_quantized or only is None or only.op not in ("Relu", "Clip"):
        return None
    return None if only.outputs[0].name in theirs else only


def _as_read(tensor: gs.Tensor) -> gs.Tensor:
    """Return the tensor that the readers of ``tensor`` see: behind Q and DQ where there is no other way.

    A Relu can be left to the quantizer behind it, whose lowest code is then 0: before the quantizer the two models
    do not compute the same.
    """
    if not tensor.outputs or any(node.op != "QuantizeLinear" for node in tensor.outputs):
        return tensor
    behind = [node for codes in tensor.outputs[0].outputs for node in codes.outputs if node.op == "DequantizeLinear"]
    return behind[0].outputs[0] if behind else tensor


def with_outputs(model: Model, names: Iterable[str]) -> tuple[bytes, dict[str, str]]:
    """Return a model with further graph outputs, and the session entries that it then needs.

    External data stays in its files, which are named by their real paths: a runtime would not follow links that lead
    out of the model's folder, as those of the Hugging Face cache do.
    """
    built = skeleton(model)
    present = {output.name for output in built.proto.graph.output}
    # ONNX Runtime infers the type of an output that has none.
    built.proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    keyed = [(tensor, built.weights[location_of(tensor)]) for tensor in keyed_tensors(built.proto)]
    files = [(tensor, values.source) for tensor, values in keyed if isinstance(values, FileValues)]
    folder = Path(os.path.commonpath([source.path.parent for _, source in files])) if files else None
    for tensor, source in files:
        location = source.path.relative_to(folder).as_posix()
        refer(tensor, location=location, offset=source.offset, length=source.length)
    built.fill()
    return built.proto.SerializeToString(), {FOLDER_KEY: str(folder)} if folder else {}


def score_outputs(model: Model, named: Sequence[str] = ()) -> Mapping[str, str]:
    """Return the outputs whose last axis holds scores of classes or tokens: name -> "logits" or "probabilities".

    Those are the outputs of a Softmax or LogSoftmax, of a product with a constant matrix (a bias behind it counts
    in), and those that are ``named``.
    """
    found: dict[str, str] = {}
    for output in model.graph.outputs:
        kind = _score_kind(output)
        if kind is not None or output.name in named:
            found[output.name] = kind or "logits"
    return found


def _score_kind(output: gs.Tensor) -> str | None:
    shape = output.shape
    if not _may_be_float(output) or (shape is not None and (len(shape) < 2 or shape[-1] == 1)):
        return None
    node = output.inputs[0] if output.inputs else None
    while node is not None and node.op in ("Identity", "Cast", "DequantizeLinear", "QuantizeLinear"):
        node = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if node is None:
        return None
    if node.op in ("Softmax", "LogSoftmax"):
        last = node.attrs.get("axis", -1) in (-1, len(shape) - 1 if shape is not None else -1)
        return ("probabilities" if node.op == "Softmax" else "logits") if last else None
    if node.op == "Add":
        products = [t.inputs[0] for t in node.inputs if t.inputs and t.inputs[0].op == "MatMul"]
        node = products[0] if len(products) == 1 and any(_is_constant(t) for t in node.inputs) else node
    return "logits" if node.op in ("MatMul", "Gemm") and _is_constant(node.inputs[1]) else None


def _is_constant(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a constant, perhaps behind operators that only reshape or dequantize it."""
    while tensor.inputs and tensor.inputs[0].op in _PASSED_ON:
        tensor = tensor.inputs[0].inputs[0]
    return isinstance(tensor, gs.Constant) or bool(tensor.inputs and tensor.inputs[0].op == "Constant")


def _may_be_float(tensor: gs.Tensor) -> bool:
    """Whether a tensor holds floating-point numbers, as far as the file says; unknown counts as yes."""
    if tensor.dtype is None:
        return bool(tensor.name)
    if isinstance(tensor.dtype, int):
        return tensor.dtype in (onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return np.dtype(tensor.dtype).name in ("float32", "float16", "float64", "bfloat16")
