"""What a file asks a runtime to compute on codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from ..constants import dtype_name
from ..graph import all_graphs, values

PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})
BYTES = ("int8", "uint8")
PACKED = frozenset({"MatMulNBits", "MatMulBnb4"})
INTEGER = frozenset(
    {"MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "OutlierMatMul"}
    | {"QGemm", "QAttention", "DynamicQuantizeLSTM"}
)
DYNAMIC_PARTS = frozenset({"DynamicQuantizeLinear"})
_BIAS = 2
_LOOKUPS = frozenset({"Gather", "Reshape", "Transpose", "Identity"})
_HALVES = frozenset({"QuantizeLinear", "DequantizeLinear"}) | DYNAMIC_PARTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A tensor that is stored as codes on its way into or out of a node.

    Attributes:
        tensor: Its name.
        codes: Type of the codes.
        scales: Type of the scales.
        stored: Whether the codes are a constant (a weight or bias), or are looked up in one (a table).
        shape: Of the codes, None when unknown.
        axis: Axis of the scales, None for one scale.
        block_size: Values that share a scale along the axis, 0 where that is not so.
        has_zero: Whether the file gives zero points at all.
        centred: Whether every zero point is 0; None when it is computed.
    """

    tensor: str
    codes: str
    scales: str
    stored: bool
    shape: tuple[int | str | None, ...] | None
    axis: int | None
    block_size: int
    has_zero: bool
    centred: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A node that may become an integer kernel.

    Attributes:
        node: The node.
        reads: Slot -> what it reads as codes.
        gives: What the quantizer behind its output makes, None where there is none.
        shared: Whether its output has readers beside that quantizer, or is an output of the graph.
    """

    node: gs.Node
    reads: dict[int, Port] = field(default_factory=dict)
    gives: Port | None = None
    shared: bool = False

    @property
    def on_codes(self) -> bool:
        """Whether the node computes with codes of activations."""
        is_integer = self.node.op in INTEGER | PACKED or self.node.op.startswith("QLinear")
        return is_integer or any(not port.stored for port in self.reads.values())


def describe_codes(candidate: Candidate) -> str:
    """Return the types of the codes that the operands of a node have, biases left out."""
    return " x ".join(port.codes for slot, port in sorted(candidate.reads.items()) if slot < _BIAS)


def candidates(graph: gs.Graph) -> list[Candidate]:
    """Return the nodes that read codes or are integer operators, and the products that stay in float."""
    found = []
    for inner in all_graphs(graph):
        outputs = {id(tensor) for tensor in inner.outputs}
        for node in inner.nodes:
            if node.op in _HALVES:
                continue
            candidate = _candidate(node, outputs)
            if candidate.on_codes or candidate.reads or (node.op in PRODUCTS and not node.domain):
                found.append(candidate)
    return found


def pairs(graph: gs.Graph) -> list[gs.Node]:
    """Return the DequantizeLinear nodes that read a QuantizeLinear: the pairs on activations."""
    nodes = (node for inner in all_graphs(graph) for node in inner.nodes)
    return [node for node in nodes if node.op == "DequantizeLinear" and _producer(node.inputs[0]) == "QuantizeLinear"]


def _candidate(node: gs.Node, outputs: set[int]) -> Candidate:
    reads = {i: port_of(t.inputs[0]) for i, t in enumerate(node.inputs) if _producer(t) == "DequantizeLinear"}
    readers = [reader for tensor in node.outputs[:1] for reader in tensor.outputs]
    behind = [reader for reader in readers if reader.op == "QuantizeLinear"]
    shared = len(readers) != len(behind) or any(id(tensor) in outputs for tensor in node.outputs)
    return Candidate(node=node, reads=reads, gives=port_of(behind[0]) if behind else None, shared=shared)


def _producer(tensor: gs.Tensor) -> str:
    return str(tensor.inputs[0].op) if len(tensor.inputs) == 1 else ""


def port_of(node: gs.Node) -> Port:
    """Return what a QuantizeLinear makes, or a DequantizeLinear reads."""
    codes = node.inputs[0] if node.op == "DequantizeLinear" else node.outputs[0]
    scale = node.inputs[1]
    per_axis = isinstance(scale, gs.Constant) and int(np.prod(scale.shape)) > 1
    return Port(
        tensor=_float_name(node),
        codes=dtype_name(codes) or _code_type(node),
        scales=dtype_name(scale),
        stored=_is_stored(codes),
        shape=None if codes.shape is None else tuple(codes.shape),
        axis=int(node.attrs.get("axis", 1)) if per_axis else None,
        block_size=int(node.attrs.get("block_size", 0)),
        has_zero=len(node.inputs) > 2 and not node.inputs[2].is_empty(),
        centred=_centred(node),
    )


def _float_name(node: gs.Node) -> str:
    """Return the name that the real values had in the float model, as far as the file tells."""
    codes = node.inputs[0] if node.op == "DequantizeLinear" else None
    if codes is None:
        return str(node.inputs[0].name)
    return str(codes.inputs[0].inputs[0].name if _producer(codes) == "QuantizeLinear" else codes.name)


def _is_stored(codes: gs.Tensor) -> bool:
    while codes.inputs and codes.inputs[0].op in _LOOKUPS and codes.inputs[0].inputs:
        codes = codes.inputs[0].inputs[0]
    return isinstance(codes, gs.Constant)


def _code_type(node: gs.Node) -> str:
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        return dtype_name(node.inputs[2])
    return "uint8"


def _centred(node: gs.Node) -> bool | None:
    if len(node.inputs) < 3 or node.inputs[2].is_empty():
        return True
    zero = node.inputs[2]
    return not np.asarray(values(zero)).astype(np.float32).any() if isinstance(zero, gs.Constant) else None


def nodes_of(graph: gs.Graph) -> Iterator[gs.Node]:
    """Yield the nodes of a graph and of all bodies in it."""
    for inner in all_graphs(graph):
        yield from inner.nodes
