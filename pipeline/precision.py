"""Floating-point types of operators, and moving a graph from one to another.

A node is *coloured* with a type. Every float operand of it whose type ONNX leaves open then has that type, the others
the one that ONNX prescribes, and wherever a tensor is written in one type and read in another a Cast stands between.
Constants are converted where they stand, one at a time and only when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import SparseValues

from ..calibrate.formats import FORMATS
from .constants import QUANTIZABLE, dtype_name
from .fresh import FreshNames
from .graph import all_graphs, constant, values
from .graph.constants import recast
from .graph.queries import STANDARD_DOMAINS
from .ordering import sort_nodes

HALVES = frozenset({"float16", "bfloat16"})

_ONNX_NAMES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16"}
_TYPED_BY_ATTRIBUTE = frozenset(
    {"Constant", "ConstantOfShape", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"}
    | {"EyeLike", "Bernoulli", "Multinomial", "HannWindow", "HammingWindow", "BlackmanWindow", "CastLike"}
)
"""Operators whose result has the type that an attribute or another operand says."""
_OPEN_OPERATORS = {"com.microsoft": frozenset({"MatMulNBits", "MatMulBnb4"})}
"""Operators of other domains whose float operands may all have any one type."""
_SMALL = 4096
"""Constants up to this many values are converted at once."""

Colour = Callable[[gs.Node], "str | None"]
"""Type of a node's float operands; None leaves them as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """Which types ONNX allows for the operands of a node.

    Attributes:
        inputs: Allowed float types by input, empty for what holds no floats.
        outputs: The same by output.
    """

    inputs: tuple[frozenset[str], ...]
    outputs: tuple[frozenset[str], ...]

    def takes(self, kind: str) -> bool:
        """Whether some operand can have the type ``kind``, and each one that has a choice can."""
        open_ones = [allowed for allowed in (*self.inputs, *self.outputs) if len(allowed) > 1]
        return bool(open_ones) and all(kind in allowed for allowed in open_ones)


def operands_of(node: gs.Node, opset: int) -> Operands | None:
    """Return the types of a node's float operands; None when nothing is known of the operator, or it runs bodies."""
    domain = node.domain or ""
    every: frozenset[str] = QUANTIZABLE
    if node.op in _OPEN_OPERATORS.get(domain, ()):
        return Operands(inputs=_present(node.inputs, [every]), outputs=_present(node.outputs, [every]))
    if domain not in STANDARD_DOMAINS or node.op in _TYPED_BY_ATTRIBUTE or not onnx.defs.has(node.op, opset):
        return None
    if any(isinstance(value, gs.Graph) for value in node.attrs.values()) or "output_dtype" in node.attrs:
        return None
    inputs, outputs = _schema_types(node.op, opset)
    return Operands(inputs=_present(node.inputs, inputs), outputs=_present(node.outputs, outputs))


@cache
def _schema_types(op: str, opset: int) -> tuple[list[frozenset[str]], list[frozenset[str]]]:
    schema = onnx.defs.get_schema(op, opset)
    constraints = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}

    def allowed(parameter: onnx.defs.OpSchema.FormalParameter) -> frozenset[str]:
        names = constraints.get(parameter.type_str, [parameter.type_str])
        return frozenset(_ONNX_NAMES[name] for name in names if name in _ONNX_NAMES)

    return [allowed(p) for p in schema.inputs], [allowed(p) for p in schema.outputs]


def _present(tensors: list[gs.Tensor], formal: list[frozenset[str]]) -> tuple[frozenset[str], ...]:
    """Return the allowed types of the operands that are there; the last formal one may stand for many."""
    none: frozenset[str] = frozenset()
    return tuple(
        formal[min(i, len(formal) - 1)] if formal and dtype_name(tensor) in QUANTIZABLE else none
        for i, tensor in enumerate(tensors)
    )


def half_nodes(graph: gs.Graph) -> dict[str, str]:
    """Return the nodes that compute in float16 or bfloat16, bodies included: name -> type."""
    found: dict[str, str] = {}
    for node in (node for inner in all_graphs(graph) for node in inner.nodes):
        kinds = [dtype_name(t) for t in (*node.outputs, *node.inputs) if not t.is_empty()]
        half = next((kind for kind in kinds if kind in HALVES), None)
        if half is not None:
            found[node.name] = half
    return found


def widen(graph: gs.Graph) -> None:
    """Let everything be computed and stored in float32, inputs and outputs too: exact, for float32 holds both halves.

    Operators of domains that nothing is known of, and those that run bodies, keep what they have, between casts.
    """
    retype(graph, lambda _node: "float32", dict.fromkeys(border_types(graph), "float32"))


def border_types(graph: gs.Graph) -> dict[str, str]:
    """Return the float types of the inputs and outputs of a graph by name."""
    return {t.name: dtype_name(t) for t in (*graph.inputs, *graph.outputs) if dtype_name(t) in QUANTIZABLE}


def retype(graph: gs.Graph, colour: Colour, border: Mapping[str, str]) -> None:
    """Give the float operands of all nodes new types, bodies included; ``graph`` is changed in place.

    Args:
        graph: The main graph, element types complete, names unique.
        colour: New type of each node; None leaves a node as it is.
        border: New type of inputs and outputs of the main graph, by name; others keep theirs.
    """
    work = _Retyping(graph=graph, colour=colour)
    scopes = list(all_graphs(graph))
    for scope in scopes:
        for node in scope.nodes:
            work.plan(node)
    for tensor in graph.inputs:
        if tensor.name in border:
            work.new[id(tensor)] = border[tensor.name]
    for scope in scopes:
        for node in list(scope.nodes):
            for index, tensor in enumerate(node.inputs):
                wanted = work.wanted.get((id(node), index), "")
                if wanted:
                    node.inputs[index] = work.read(scope, tensor, wanted)
        for index, tensor in enumerate(scope.outputs):
            before = dtype_name(tensor)
            wanted = border.get(tensor.name, before) if scope is graph else before
            if before in QUANTIZABLE:
                work.give(scope, index, tensor, wanted)
    work.finish()
    sort_nodes(graph)


@dataclass(slots=True, kw_only=True)
class _Retyping:
    """A change of types under way: what is planned goes by the identity of tensors and nodes.

    Attributes:
        graph: The main graph.
        colour: New type of each node.
        new: New type of each tensor that gets one.
        wanted: Type in which a node wants an input, by node and index.
    """

    graph: gs.Graph
    colour: Colour
    new: dict[int, str] = field(default_factory=dict)
    wanted: dict[tuple[int, int], str] = field(default_factory=dict)
    _tensors: dict[int, gs.Tensor] = field(default_factory=dict)
    _made: dict[tuple[int, int, str], gs.Tensor] = field(default_factory=dict)
    _fresh: FreshNames = field(init=False)

    def __post_init__(self) -> None:
        self._fresh = FreshNames(self.graph)

    def plan(self, node: gs.Node) -> None:
        """Note the types that a node will want and give."""
        kind = self.colour(node)
        operands = operands_of(node, int(self.graph.opset)) if kind is not None else None
        for index, tensor in enumerate(node.inputs):
            if dtype_name(tensor) in QUANTIZABLE and node.op != "Cast":
                allowed = operands.inputs[index] if operands is not None else frozenset({dtype_name(tensor)})
                self.wanted[id(node), index] = _pick(kind, allowed, dtype_name(tensor))
        for index, tensor in enumerate(node.outputs):
            if operands is not None and dtype_name(tensor) in QUANTIZABLE:
                self._assign(tensor, _pick(kind, operands.outputs[index], dtype_name(tensor)))

    def _assign(self, tensor: gs.Tensor, kind: str) -> None:
        self.new[id(tensor)] = kind
        self._tensors[id(tensor)] = tensor

    def type_of(self, tensor: gs.Tensor) -> str:
        """Return the type that a tensor will have."""
        return self.new.get(id(tensor), dtype_name(tensor))

    def read(self, scope: gs.Graph, tensor: gs.Tensor, wanted: str) -> gs.Tensor:
        """Return ``tensor`` in the type ``wanted``, through a Cast in ``scope`` if need be."""
        if self.type_of(tensor) == wanted:
            return tensor
        is_constant = isinstance(tensor, gs.Constant)
        key = (0 if is_constant else id(scope), id(tensor), wanted)
        if key not in self._made:
            self._made[key] = self._converted(tensor, wanted) if is_constant else self._cast(scope, tensor, wanted)
        return self._made[key]

    def give(self, scope: gs.Graph, index: int, tensor: gs.Tensor, wanted: str) -> None:
        """Let output ``index`` of ``scope`` have the type ``wanted``, under its own name."""
        if self.type_of(tensor) == wanted:
            return
        public = tensor.name
        result = self.read(scope, tensor, wanted)
        if not isinstance(tensor, gs.Constant):
            tensor.name = self._fresh(f"{public}_{self.type_of(tensor)}")
        result.name, result.shape = public, tensor.shape
        scope.outputs[index] = result

    def finish(self) -> None:
        """Write down the new types, and drop casts that change nothing any more."""
        for key, kind in self.new.items():
            if key in self._tensors:
                self._tensors[key].dtype = FORMATS.get(kind).dtype
        for tensor in self.graph.inputs:
            tensor.dtype = FORMATS.get(self.new[id(tensor)]).dtype if id(tensor) in self.new else tensor.dtype
        for scope in list(all_graphs(self.graph)):
            for node in scope.nodes:
                if node.op == "Cast" and id(node.outputs[0]) in self.new:
                    node.attrs["to"] = _number(self.new[id(node.outputs[0])])
            _drop_idle_casts(scope)

    def _cast(self, scope: gs.Graph, tensor: gs.Tensor, wanted: str) -> gs.Tensor:
        name = f"{tensor.name}_{wanted}"
        result = gs.Variable(self._fresh(name), dtype=FORMATS.get(wanted).dtype, shape=tensor.shape)
        attrs = {"to": _number(wanted)}
        cast = gs.Node(op="Cast", name=self._fresh(f"{name}_Cast"), attrs=attrs, inputs=[tensor], outputs=[result])
        scope.nodes.append(cast)
        return result

    def _converted(self, tensor: gs.Constant, wanted: str) -> gs.Constant:
        made = converted(tensor, self._fresh(f"{tensor.name}_{wanted}"), wanted)
        is_output = any(tensor is output for inner in all_graphs(self.graph) for output in inner.outputs)
        if not is_output and all(self._wants(reader, tensor, wanted) for reader in tensor.outputs):
            made.name = tensor.name  # Nobody reads the old one any more.
        return made

    def _wants(self, reader: gs.Node, tensor: gs.Tensor, kind: str) -> bool:
        slots = [i for i, entry in enumerate(reader.inputs) if entry is tensor]
        return all(self.wanted.get((id(reader), i)) == kind for i in slots)


def converted(tensor: gs.Constant, name: str, kind: str) -> gs.Constant:
    """Return a constant of another float type; large ones are converted when they are read."""
    onnx_type = FORMATS.get(kind).onnx_type
    is_small = np.prod([int(d) for d in tensor.shape]) <= _SMALL
    if is_small or isinstance(tensor._values, SparseValues):
        return constant(name, _rounded(values(tensor), kind), onnx_type)
    return recast(name, tensor, onnx_type)


def _rounded(array: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(array).astype(FORMATS.get(kind).dtype)


def _number(kind: str) -> int:
    return int(onnx.TensorProto.DataType.Value(FORMATS.get(kind).onnx_type))


def _pick(kind: str | None, allowed: frozenset[str], before: str) -> str:
    if kind in allowed:
        return str(kind)
    return "float32" if "float32" in allowed and kind is not None else before


def _drop_idle_casts(scope: gs.Graph) -> None:
    """Let readers of a Cast to the type that its input has read that input."""
    outputs = {id(tensor) for tensor in scope.outputs}
    for node in scope.nodes:
        if node.op != "Cast" or dtype_name(node.inputs[0]) not in QUANTIZABLE or id(node.outputs[0]) in outputs:
            continue
        if _number(dtype_name(node.inputs[0])) == node.attrs.get("to"):
            source, result = node.inputs[0], node.outputs[0]
            for reader in list(result.outputs):
                for i, entry in enumerate(reader.inputs):
                    if entry is result:
                        reader.inputs[i] = source
            if any(result is t for inner in all_graphs(scope) for t in inner.outputs):
                continue
            node.inputs.clear()
            node.outputs.clear()
    scope.nodes = [node for node in scope.nodes if node.outputs]
