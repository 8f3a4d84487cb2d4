"""What the rules look at: every Q/DQ node of a model with its operands resolved, and the graph around it.

Letters: ``x [d0..dn]`` is the tensor that is quantized or dequantized, ``s`` the number of scales along the axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from ..graph import Model, values
from .targets import TargetTraits

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
DOMAINS = ("", "ai.onnx", "com.microsoft")
DEFAULT_AXIS = 1

Array = npt.NDArray[Any]
Shape = tuple[int | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A place that breaks a rule."""

    node: str
    tensor: str
    found: str
    expected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """A graph or function body, and what is needed to judge what stands in it.

    Attributes:
        name: ``""`` for the main graph, else a path such as ``"If_3/then_branch"`` or ``"function qpipe::F"``.
        graph: Its nodes and outputs.
        opset: Version of the default ONNX domain in force.
    """

    name: str
    graph: gs.Graph
    opset: int

    def label(self, node: gs.Node) -> str:
        """Return the node's name as reports print it."""
        own = node.name or f"{node.op} -> {node.outputs[0].name if node.outputs else '?'}"
        return f"{self.name}/{own}" if self.name else own


@dataclass(frozen=True, kw_only=True)
class Site:
    """One Q or DQ node."""

    node: gs.Node
    scope: Scope

    @property
    def is_quantize(self) -> bool:
        """Whether it is a QuantizeLinear."""
        return bool(self.node.op == QUANTIZE)

    @property
    def is_contrib(self) -> bool:
        """Whether it is ONNX Runtime's own operator, which takes 4 and 16-bit types at any opset."""
        return bool(self.node.domain == "com.microsoft")

    @property
    def x(self) -> gs.Tensor:
        """The tensor that is quantized or dequantized."""
        return self.node.inputs[0] if self.node.inputs else gs.Variable.empty()

    @property
    def y(self) -> gs.Tensor:
        """The result."""
        return self.node.outputs[0] if self.node.outputs else gs.Variable.empty()

    @property
    def scale(self) -> gs.Tensor | None:
        """The scale operand, None when the node has none."""
        return _operand(self.node, 1)

    @property
    def zero_point(self) -> gs.Tensor | None:
        """The zero-point operand, None when it is left out."""
        return _operand(self.node, 2)

    @cached_property
    def scales(self) -> Array | None:
        """Values of a constant scale, in its own shape; None when it is computed at run time."""
        return constant_values(self.scale)

    @cached_property
    def zeros(self) -> Array | None:
        """Values of a constant zero point; None when absent or computed at run time."""
        return constant_values(self.zero_point)

    @property
    def shape(self) -> Shape | None:
        """Shape of ``x`` as far as it is known; None when not even the rank is."""
        return shape_of(self.x) or shape_of(self.y)

    @property
    def scale_shape(self) -> Shape | None:
        """Shape of the scale as far as it is known."""
        return None if self.scale is None else shape_of(self.scale)

    @property
    def has_axis(self) -> bool:
        """Whether the axis is written down."""
        return "axis" in self.node.attrs

    @property
    def axis(self) -> int:
        """The axis in force, possibly negative, possibly out of range."""
        return self._integer("axis", DEFAULT_AXIS)

    @property
    def block_size(self) -> int:
        """Values per block, 0 for none."""
        return self._integer("block_size", 0)

    @property
    def codes_type(self) -> str | None:
        """ONNX name of the type of the codes, e.g. ``"INT8"``; None when nothing in the file says it."""
        if not self.is_quantize:
            return type_name(self.x) or type_name(self.zero_point)
        output_type = self._integer("output_dtype", 0)
        if self.zero_point is not None and (named := type_name(self.zero_point)):
            return named
        if output_type:
            return str(onnx.TensorProto.DataType.Name(output_type))
        return type_name(self.y) or "UINT8"

    @property
    def per_tensor(self) -> bool:
        """Whether one scale serves the whole tensor."""
        return self.scale_shape is not None and all(d == 1 for d in self.scale_shape) and not self.block_size

    def problem(self, found: str, expected: str, tensor: gs.Tensor | None = None) -> Problem:
        """Return a problem at this node."""
        about = tensor if tensor is not None else self.x
        return Problem(node=self.scope.label(self.node), tensor=about.name, found=found, expected=expected)

    def _integer(self, name: str, default: int) -> int:
        value = self.node.attrs.get(name, default)
        # Inside a function an attribute can be a reference to one of the call.
        return value if isinstance(value, int) else default


@dataclass(frozen=True, kw_only=True)
class Context:
    """A model as the rules see it."""

    model: Model
    target: TargetTraits | None
    scopes: tuple[Scope, ...]
    sites: tuple[Site, ...] = field(default=())

    @classmethod
    def of(cls, model: Model, target: TargetTraits | None) -> Context:
        """Collect all scopes and Q/DQ nodes of ``model``."""
        scopes = tuple(_scopes(model))
        sites = tuple(
            Site(node=node, scope=scope)
            for scope in scopes
            for node in scope.graph.nodes
            if node.op in (QUANTIZE, DEQUANTIZE) and (node.domain or "") in DOMAINS
        )
        return cls(model=model, target=target, scopes=scopes, sites=sites)

    @cached_property
    def _by_node(self) -> dict[int, Site]:
        return {id(site.node): site for site in self.sites}

    @cached_property
    def _output_ids(self) -> set[int]:
        return {id(tensor) for scope in self.scopes for tensor in scope.graph.outputs}

    def is_output(self, tensor: gs.Tensor) -> bool:
        """Whether a graph or function body returns the tensor."""
        return id(tensor) in self._output_ids

    def producer(self, tensor: gs.Tensor | None, op: str) -> Site | None:
        """Return the Q or DQ node (``op``) that computes ``tensor``, None when something else does."""
        if tensor is None or not tensor.inputs:
            return None
        site = self._by_node.get(id(tensor.inputs[0]))
        return site if site is not None and site.node.op == op else None

    def consumers(self, tensor: gs.Tensor, op: str) -> list[Site]:
        """Return the Q or DQ nodes (``op``) that read ``tensor`` as their first input."""
        found = (self._by_node.get(id(node)) for node in tensor.outputs)
        return [site for site in found if site is not None and site.node.op == op and site.x is tensor]


def constant_of(tensor: gs.Tensor | None) -> gs.Constant | None:
    """Return the constant behind ``tensor``: an initializer, or the value of a Constant node."""
    if isinstance(tensor, gs.Constant):
        return tensor
    if tensor is None or not tensor.inputs or tensor.inputs[0].op != "Constant":
        return None
    value = tensor.inputs[0].attrs.get("value")
    return value if isinstance(value, gs.Constant) else None


def constant_values(tensor: gs.Tensor | None) -> Array | None:
    """Return the values of a constant tensor, None for one that is computed at run time."""
    constant = constant_of(tensor)
    if constant is not None:
        return values(constant)
    if tensor is None or not tensor.inputs or tensor.inputs[0].op != "Constant":
        return None
    attrs = tensor.inputs[0].attrs
    for name, dtype in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64)):
        if name in attrs:
            return np.asarray(attrs[name], dtype)
    return None


def shape_of(tensor: gs.Tensor) -> Shape | None:
    """Return the shape with None for dimensions that are not fixed; None when the rank is unknown."""
    constant = constant_of(tensor)
    shape = constant.shape if constant is not None else tensor.shape
    return None if shape is None else tuple(d if isinstance(d, int) and d >= 0 else None for d in shape)


def type_name(tensor: gs.Tensor | None) -> str | None:
    """Return the ONNX name of the element type, e.g. ``"INT8"``; None when the file does not say."""
    if tensor is None:
        return None
    constant = constant_of(tensor)
    dtype = constant.dtype if constant is not None else tensor.dtype
    if dtype is None:
        return None
    number = dtype if isinstance(dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return str(onnx.TensorProto.DataType.Name(number)) if number else None


def text(shape: Shape | None) -> str:
    """Return a shape as reports print it."""
    return "[?]" if shape is None else "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"


def volume(shape: Shape) -> int | None:
    """Return the number of elements, None when a dimension is not fixed."""
    return None if None in shape else math.prod(d for d in shape if d is not None)


def _operand(node: gs.Node, index: int) -> gs.Tensor | None:
    tensor = node.inputs[index] if len(node.inputs) > index else None
    return None if tensor is None or tensor.is_empty() else tensor


def _scopes(model: Model) -> Iterator[Scope]:
    yield from _nested(model.graph, "", model.opset)
    for proto in model.functions:
        function = OnnxImporter.import_function(proto, model_opset=model.opset)
        yield from _nested(function, f"function {proto.domain}::{proto.name}", function.opset)


def _nested(graph: gs.Graph, name: str, opset: int) -> Iterator[Scope]:
    scope = Scope(name=name, graph=graph, opset=opset)
    yield scope
    for node in graph.nodes:
        for key, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                yield from _nested(value, f"{scope.label(node)}/{key}", opset)
