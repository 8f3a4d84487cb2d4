"""Forms: how a decision is expressed in the graph. One file per form; `stages.insert` only dispatches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from ...calibrate.qarray import QArray, QParams, Spec
from ...calibrate.registry import Registry
from ..fresh import FreshNames
from ..graph import constant
from ..plan import Decision, Site


@dataclass(slots=True, kw_only=True)
class Workbench:
    """The graph under work and the numbers that the earlier stages found.

    Attributes:
        graph: The main graph; changed in place.
        activations: Parameters by tensor name and spec.
        weights: Quantized weights by site.
        fuses_relu: Whether the target runs a product and the Relu behind it in one kernel, whatever its codes.
        scale_formats: Formats of 8 bits in which scales of blocks are stored; others become float32.
        accuracy_level: What MatMulNBits rounds its activations to.
        scope: The graph whose nodes are being rewritten: the main one, or a body of If, Loop or Scan.
        made: Tensors that were already inserted into `scope`, by a key that the form chooses. Each graph gets its own:
            runtimes do not fuse across the border of a body.
        constants: Constants that were already made, by a key that the form chooses; all graphs share them.
        notes: What a user should be told.
        fresh: Gives out names that nothing in the model has yet.
    """

    graph: gs.Graph
    activations: Mapping[tuple[str, Spec], QParams]
    weights: Mapping[Site, QArray]
    fuses_relu: bool = False
    scale_formats: frozenset[str] = frozenset()
    accuracy_level: int = 0
    scope: gs.Graph = field(init=False)
    made: dict[tuple[object, ...], gs.Tensor] = field(default_factory=dict)
    functions: dict[str, onnx.FunctionProto] = field(default_factory=dict)
    constants: dict[tuple[object, ...], gs.Constant] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    fresh: FreshNames = field(init=False)

    def __post_init__(self) -> None:
        self.scope = self.graph
        self.fresh = FreshNames(self.graph)

    def enter(self, scope: gs.Graph) -> None:
        """Turn to the nodes of another graph."""
        self.scope, self.made = scope, {}

    def constant(self, base: str, array: npt.NDArray[Any], onnx_type: str) -> gs.Constant:
        """Make a constant of any ONNX type under a fresh name."""
        return constant(self.fresh(base), array, onnx_type)

    def shared_constant(
        self, key: tuple[object, ...], base: str, array: npt.NDArray[Any], onnx_type: str
    ) -> gs.Constant:
        """Return the constant that was made under ``key``, making it when there is none."""
        if key not in self.constants:
            self.constants[key] = self.constant(base, array, onnx_type)
        return self.constants[key]

    def variable(self, base: str, like: gs.Tensor | None = None) -> gs.Variable:
        """Make a tensor under a fresh name, with type and shape of ``like``."""
        shape = None if like is None or like.shape is None else list(like.shape)
        return gs.Variable(self.fresh(base), dtype=None if like is None else like.dtype, shape=shape)

    def node(
        self, op: str, base: str, inputs: list[gs.Tensor], output: gs.Tensor, attrs: Mapping[str, Any] | None = None
    ) -> gs.Node:
        """Add an operator with one output under a fresh name; `stages.insert` sorts the graph afterwards."""
        node = gs.Node(op=op, name=self.fresh(base), attrs=dict(attrs or {}), inputs=inputs, outputs=[output])
        self.scope.nodes.append(node)
        return node


class Form(Protocol):
    """Carry out the decisions of one node."""

    def __call__(self, bench: Workbench, node: gs.Node, decisions: list[Decision]) -> None:
        """Rewrite ``node`` (and what feeds it) in ``bench.graph`` as ``decisions`` say."""
        ...


FORMS: Registry[Form] = Registry("form", __name__)
