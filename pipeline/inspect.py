"""What is in a model: types, weights, bits per weight, memory, what is quantized. No weight is read.

A *parameter* is an element of a weight: of a float constant, or of the codes of a quantized one. Scales, zero points,
shapes and indices are none, but what they take counts into the bits per parameter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from .checks.context import DEQUANTIZE, QUANTIZE, constant_of, type_name
from .graph import Model, constants, stored_size
from .graph.constants import FileValues
from .graph.protos import all_tensors, byte_size
from .graph.queries import all_graphs

SCHEMA_VERSION = 1

PRECISIONS = {"FP32": 32, "FP16": 16, "INT8": 8, "INT4": 4}
"""Bits per parameter of the precisions that memory is told for."""

FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"})

INTEGER_OPS = frozenset(
    {"QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "QGemm", "QAttention"}
    | {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}
)

PACKED_OPS = {"MatMulNBits": ("bits", "K", "N"), "MatMulBnb4": (None, "K", "N")}
"""Operators that keep a weight [N, K] packed in uint8 in input 1, by the attributes that say how large it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFact:
    """One stored tensor.

    Attributes:
        name: Its name.
        type: ONNX type, e.g. ``"INT8"``.
        shape: Dimensions.
        bytes: What it takes in the file.
        role: ``"weight"``, ``"parameter of quantization"`` (scales, zero points) or ``"other"``.
        parameters: How many weights it holds.
        external: Name of the data file, None when it is in the model file.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    role: str
    parameters: int
    external: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedNode:
    """A node that computes with quantized operands.

    Attributes:
        node: Its name.
        op: Its operator.
        inputs: Type of each input: that of the codes, or ``"float"``.
        output: Type that the result is rounded to, ``"float"`` when it is not.
    """

    node: str
    op: str
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Everything that `inspect_model` finds; see there."""

    path: str
    producer: str
    ir_version: int
    opsets: dict[str, int]
    metadata: dict[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: int
    operators: dict[str, int]
    functions: tuple[str, ...]
    subgraphs: int
    parameters: int
    bits_per_weight: float
    bytes_by_type: dict[str, int]
    parameters_by_type: dict[str, int]
    memory_by_precision: dict[str, float]
    file_bytes: int
    data_files: dict[str, int]
    quantized: tuple[QuantizedNode, ...]
    tensors: tuple[TensorFact, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON data."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def inspect_model(model: Model) -> ModelFacts:
    """Collect the facts about a model, those of subgraphs and functions included.

    Returns:
        ``parameters`` and ``bits_per_weight`` as the module's text defines them; ``bytes_by_type`` of all stored
        tensors, ``parameters_by_type`` of weights only; ``memory_by_precision`` [bytes] is what the same number of
        weights would take; ``data_files`` maps the path of each external file to its size.
    """
    graphs = list(all_graphs(model.graph))
    tensors = tuple(_tensors(model, graphs))
    weights = [fact for fact in tensors if fact.role == "weight"]
    parameters = sum(fact.parameters for fact in weights)
    spent = sum(fact.bytes for fact in tensors if fact.role != "other")
    nodes = [node for graph in graphs for node in graph.nodes]
    return ModelFacts(
        path=str(model.path or ""),
        producer=" ".join((model.shell.producer_name, model.shell.producer_version)).strip(),
        ir_version=model.ir_version,
        opsets={"ai.onnx": model.opset, **model.domains},
        metadata=dict(model.metadata),
        inputs=tuple(_described(tensor) for tensor in model.graph.inputs),
        outputs=tuple(_described(tensor) for tensor in model.graph.outputs),
        nodes=len(nodes),
        operators=dict(Counter(_operator(node) for node in nodes).most_common()),
        functions=tuple(f"{f.domain}::{f.name}" for f in model.functions),
        subgraphs=len(graphs) - 1,
        parameters=parameters,
        bits_per_weight=8 * spent / parameters if parameters else 0.0,
        bytes_by_type=_totals(tensors, "bytes"),
        parameters_by_type=_totals(weights, "parameters"),
        memory_by_precision=memory_by_precision(parameters),
        file_bytes=file_bytes(model),
        data_files=data_files(model),
        quantized=tuple(fact for node in nodes if (fact := _quantized(node))),
        tensors=tensors,
    )


def memory_by_precision(parameters: float) -> dict[str, float]:
    """Return what so many parameters take in FP32, FP16, INT8 and INT4 [bytes], without scales.

    >>> {name: size / 1e9 for name, size in memory_by_precision(13e9).items()}
    {'FP32': 52.0, 'FP16': 26.0, 'INT8': 13.0, 'INT4': 6.5}
    """
    return {name: parameters * bits / 8 for name, bits in PRECISIONS.items()}


def file_bytes(model: Model) -> int:
    """Return the size of a loaded model's file and its data files [bytes]; 0 for one that was built in memory."""
    own = model.path.stat().st_size if model.path is not None else 0
    return own + sum(data_files(model).values())


def data_files(model: Model) -> dict[str, int]:
    """Return the size [bytes] of each external data file of a model, by path."""
    held = [constant._values for graph in all_graphs(model.graph) for constant in constants(graph)]
    paths = {values.source.path for values in [*held, *model.weights.values()] if isinstance(values, FileValues)}
    return {str(path): Path(path).stat().st_size for path in sorted(paths)}


def _tensors(model: Model, graphs: list[gs.Graph]) -> Iterator[TensorFact]:
    seen: set[int] = set()
    for graph in graphs:
        for constant in constants(graph):
            if id(constant) not in seen:
                seen.add(id(constant))
                yield _fact(constant)
    for function in model.functions:
        for tensor in all_tensors(function):
            kind = stored_type(tensor.data_type)
            count = math.prod(tensor.dims)
            is_weight = kind in FLOATS and len(tensor.dims) > 0
            yield TensorFact(
                name=f"{function.domain}::{function.name}/{tensor.name}",
                type=kind,
                shape=tuple(tensor.dims),
                bytes=byte_size(tensor.data_type, tensor.dims),
                role="weight" if is_weight else "other",
                parameters=count if is_weight else 0,
                external=None,
            )


def stored_type(number: int) -> str:
    """Return the ONNX name of a type number, ``"UNDEFINED"`` for one that is none."""
    import onnx

    return str(onnx.TensorProto.DataType.Name(number)) if number in onnx.TensorProto.DataType.values() else "UNDEFINED"


def _fact(constant: gs.Constant) -> TensorFact:
    values = constant._values
    kind = type_name(constant) or "UNDEFINED"
    role, parameters = _role(constant, kind)
    return TensorFact(
        name=constant.name,
        type=kind,
        shape=tuple(int(d) for d in constant.shape),
        bytes=stored_size(constant),
        role=role,
        parameters=parameters,
        external=values.source.path.name if isinstance(values, FileValues) else None,
    )


def _role(constant: gs.Constant, kind: str) -> tuple[str, int]:
    """Return a constant's role and how many weights it holds, from the places that read it."""
    elements = math.prod(int(d) for d in constant.shape)
    roles = {_role_at(node, index) for node in constant.outputs for index, t in enumerate(node.inputs) if t is constant}
    if "codes" in roles:
        return "weight", elements
    for node in constant.outputs:
        if node.op in PACKED_OPS and len(node.inputs) > 1 and node.inputs[1] is constant:
            _, rows, columns = PACKED_OPS[node.op]
            return "weight", int(node.attrs.get(rows, 0)) * int(node.attrs.get(columns, 0))
    if "quantization" in roles:
        return "parameter of quantization", 0
    if kind in FLOATS and len(constant.shape) > 0:
        return "weight", elements
    return "other", 0


def _role_at(node: gs.Node, index: int) -> str:
    """Return what input ``index`` of a node is: ``"codes"``, ``"quantization"`` or ``""``."""
    if node.op in (QUANTIZE, DEQUANTIZE):
        return "quantization" if index else "codes"
    if node.op in PACKED_OPS:
        return "quantization" if index > 1 else ""
    if node.op == "DynamicQuantizeLSTM":
        return "codes" if index in (1, 2) else "quantization" if index >= 8 else ""
    integer = {"QLinearMatMul": (0, 3), "QLinearConv": (0, 3, 8), "MatMulInteger": (0, 1), "ConvInteger": (0, 1)}
    if node.op in integer:
        return "codes" if index in integer[node.op] else "quantization"
    return ""


def _quantized(node: gs.Node) -> QuantizedNode | None:
    if node.op in (QUANTIZE, DEQUANTIZE):
        return None
    inputs = tuple(_codes_behind(tensor) for tensor in node.inputs)
    if node.op in PACKED_OPS:
        bits, _, _ = PACKED_OPS[node.op]
        inputs = ("float", f"INT{node.attrs.get(bits, 4)}")
    elif node.op in INTEGER_OPS or (node.domain or "").startswith("qpipe"):
        inputs = tuple(type_name(tensor) or "?" for tensor in node.inputs)
    elif all(kind == "float" for kind in inputs):
        return None
    return QuantizedNode(node=node.name, op=_operator(node), inputs=inputs, output=_codes_ahead(node))


def _codes_behind(tensor: gs.Tensor) -> str:
    if not tensor.inputs or tensor.inputs[0].op != DEQUANTIZE:
        return "float"
    source = tensor.inputs[0]
    codes = type_name(source.inputs[0])
    if codes is None and source.inputs[0].inputs and len(source.inputs[0].inputs[0].inputs) > 2:
        codes = type_name(source.inputs[0].inputs[0].inputs[2])
    zero_point = source.inputs[2] if len(source.inputs) > 2 else None
    return codes or type_name(zero_point) or "UINT8"


def _codes_ahead(node: gs.Node) -> str:
    readers = [reader for tensor in node.outputs for reader in tensor.outputs]
    if not readers or any(reader.op != QUANTIZE for reader in readers):
        return "float"
    zero_point = readers[0].inputs[2] if len(readers[0].inputs) > 2 else None
    return type_name(constant_of(zero_point)) or type_name(readers[0].outputs[0]) or "UINT8"


def _operator(node: gs.Node) -> str:
    return node.op if (node.domain or "") in ("", "ai.onnx") else f"{node.domain}::{node.op}"


def _described(tensor: gs.Tensor) -> str:
    shape = "[...]" if tensor.shape is None else f"[{','.join('?' if d is None else str(d) for d in tensor.shape)}]"
    return f"{tensor.name} {(type_name(tensor) or 'unknown').lower()}{shape}"


def _totals(facts: Any, field: str) -> dict[str, int]:
    totals: Counter[str] = Counter()
    for fact in facts:
        totals[fact.type] += getattr(fact, field)
    return dict(totals.most_common())
