"""Regions of a graph in which tensors are codes, and which of them share one scale.

A region starts at a *seed*, an operator that multiplies by a weight, and *grows*: where a seed's output is codes,
operators that compute on codes or move them join in while all their inputs are codes or constants. Operators that only
move codes join whoever reads them: the DequantizeLinear is as good behind them, and ONNX Runtime moves it there anyway
(and fails when it then meets the border of a body, or int8 at opset 21). Regions end at the border of a body of If,
Loop or Scan: no runtime fuses across it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from ..constants import FLOATS, dtype_name, weight_of
from ..rules import OpRule
from .context import Context


@dataclass(slots=True)
class Regions:
    """Which operators of one graph compute on codes, built node by node in topological order.

    Attributes:
        graph: The main graph, or a body.
        context: Says which nodes and tensors may take part.
    """

    graph: gs.Graph
    context: Context
    _members: dict[str, tuple[gs.Node, OpRule]] = field(default_factory=dict)
    _codes: dict[int, gs.Tensor] = field(default_factory=dict)
    _places: dict[str, gs.Tensor] = field(default_factory=dict)
    _absorbed: set[str] = field(default_factory=set)
    _parent: dict[str, str] = field(default_factory=dict)
    _outputs: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._outputs = {id(tensor) for tensor in self.graph.outputs}

    def seed(self, node: gs.Node, rule: OpRule, *, gives_codes: bool) -> None:
        """Start a region at a node whose data inputs are codes, and whose output is codes too if it ``gives_codes``."""
        self._members[node.name] = (node, rule)
        if gives_codes:
            self._mark(node)

    def join(self, node: gs.Node, rule: OpRule) -> str:
        """Let an operator join when all its data inputs are codes or constants; return why it does not, or ``""``."""
        inputs = [tensor for _, tensor in rule.data_inputs(node)]
        outside = [t for t in inputs if not self.is_codes(t) and weight_of(t) is None]
        if outside:
            return f"its input {outside[0].name!r} is float: quantizing for this alone would cost more than it gains"
        if rule.kind == "absorbed":
            return "no quantizer can absorb it here: it is no lone reader, or the quantizer cuts elsewhere"
        needed = [t for t in inputs if not self.is_codes(t)]
        if rule.kind == "elementwise":
            needed.append(self.quantizer_place(node))
        unfit = next((why for t in needed if (why := self.context.unfit(t))), "")
        if not unfit:
            self._admit(node, rule, [t for t in inputs if self.is_codes(t)])
        return unfit

    def is_absorbed(self, node: gs.Node) -> bool:
        """Whether the quantizer behind a product does what ``node`` does."""
        return node.name in self._absorbed

    def members(self) -> Iterator[tuple[gs.Node, OpRule]]:
        """Yield the operators of all regions with their rules, in topological order."""
        yield from self._members.values()

    def code_outputs(self, node: gs.Node) -> list[gs.Tensor]:
        """Return the tensors that leave a member as codes: its outputs, or that of the Relu that it absorbs."""
        place = self._places.get(node.name)
        return [place] if place is not None else [t for t in node.outputs if self.is_codes(t)]

    def is_codes(self, tensor: gs.Tensor) -> bool:
        """Whether the producer of a tensor gives codes."""
        return id(tensor) in self._codes

    def groups(self) -> dict[str, str]:
        """Return, for every tensor that shares a scale, the name that stands for its group."""
        return {name: self._find(name) for name in self._parent}

    def quantizer_place(self, node: gs.Node) -> gs.Tensor:
        """Return where the quantizer behind ``node`` stands: behind a Relu or Clip that only ``node`` feeds."""
        output = node.outputs[0]
        if len(output.outputs) != 1 or id(output) in self._outputs:
            return output
        follower = output.outputs[0]
        if follower.inputs[0] is not output or not self.context.absorbs(node, follower):
            return output
        return follower.outputs[0]

    def _admit(self, node: gs.Node, rule: OpRule, codes: list[gs.Tensor]) -> None:
        self._members[node.name] = (node, rule)
        if rule.kind == "elementwise":
            self._mark(node)
            return
        floats = [t for t in node.outputs if dtype_name(t) in FLOATS]
        self._codes.update({id(tensor): tensor for tensor in floats})
        for tensor in codes[1:] + floats:
            self._union(codes[0].name, tensor.name)

    def _mark(self, node: gs.Node) -> None:
        tensor = self.quantizer_place(node)
        if tensor is not node.outputs[0]:
            self._absorbed.add(tensor.inputs[0].name)
        self._codes[id(tensor)] = tensor
        self._places[node.name] = tensor

    def _find(self, name: str) -> str:
        root = name
        while self._parent.get(root, root) != root:
            root = self._parent[root]
        while self._parent.get(name, name) != root:
            self._parent[name], name = root, self._parent[name]
        return root

    def _union(self, first: str, second: str) -> None:
        self._parent.setdefault(first, first)
        self._parent.setdefault(second, second)
        self._parent[self._find(second)] = self._find(first)
