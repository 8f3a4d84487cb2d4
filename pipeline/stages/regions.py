"""Regions of the graph in which tensors are codes, and which of them share one scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from ..calibration import Calibration
from ..constants import FLOATS, dtype_name
from ..rules import RULES, OpRule
from ..targets import Target


@dataclass(slots=True)
class Regions:
    """Which operators compute on codes, built node by node in topological order.

    Attributes:
        graph: The float graph.
        target: Names the operators whose kernel needs a quantizer behind it.
    """

    graph: gs.Graph
    target: Target
    _members: dict[str, tuple[gs.Node, OpRule]] = field(default_factory=dict)
    _codes: dict[int, gs.Tensor] = field(default_factory=dict)
    _places: dict[str, gs.Tensor] = field(default_factory=dict)
    _absorbed: set[str] = field(default_factory=set)
    _parent: dict[str, str] = field(default_factory=dict)

    def seed(self, node: gs.Node, rule: OpRule) -> None:
        """Start a region at a weighted operator; its output is codes when its kernel needs that."""
        self._members[node.name] = (node, rule)
        if node.op in self.target.needs_output:
            self._mark(node)

    def can_carry_output(self, node: gs.Node, calibration: Calibration | None) -> bool:
        """Whether the tensor behind which the quantizer would stand has statistics."""
        tensor = self._quantizer_place(node)
        return calibration is not None and tensor.name in calibration.tensors

    def grow(self, node: gs.Node, rule: OpRule) -> bool:
        """Let an operator join when all its data inputs are codes; whether it did."""
        if node.name in self._absorbed:
            return True
        inputs = [t for _, t in rule.data_inputs(node)]
        if rule.kind == "absorbed" or not inputs or not all(self.is_codes(t) for t in inputs):
            return False
        self._members[node.name] = (node, rule)
        if rule.kind == "passthrough":
            floats = [t for t in node.outputs if dtype_name(t) in FLOATS]
            self._codes.update({id(tensor): tensor for tensor in floats})
            for tensor in inputs[1:] + floats:
                self._union(inputs[0].name, tensor.name)
        else:
            self._mark(node)
        return True

    def why_not(self, node: gs.Node, rule: OpRule) -> str:
        """Return why an operator did not join."""
        outside = [t.name for _, t in rule.data_inputs(node) if not self.is_codes(t)]
        if rule.kind == "absorbed":
            return "float operator between float operators"
        return f"its input {outside[0]!r} is float: quantizing only for this operator would cost more than it gains"

    def prune(self) -> None:
        """Let operators that only move codes leave again where nothing behind them reads codes."""
        for name, (node, rule) in reversed(list(self._members.items())):
            if rule.kind == "passthrough" and not any(self._reads_codes(t) for t in node.outputs):
                del self._members[name]
                for tensor in node.outputs:
                    self._codes.pop(id(tensor), None)

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

    def _mark(self, node: gs.Node) -> None:
        tensor = self._quantizer_place(node)
        if tensor is not node.outputs[0]:
            self._absorbed.add(tensor.inputs[0].name)
        self._codes[id(tensor)] = tensor
        self._places[node.name] = tensor

    def _quantizer_place(self, node: gs.Node) -> gs.Tensor:
        """Return where the quantizer behind ``node`` stands: behind a Relu or Clip that only ``node`` feeds."""
        output = node.outputs[0]
        if len(output.outputs) != 1 or any(output is t for t in self.graph.outputs):
            return output
        follower = output.outputs[0]
        if follower.op not in RULES or RULES.get(follower.op).kind != "absorbed":
            return output
        return follower.outputs[0] if follower.op in self.target.kernels else output

    def _reads_codes(self, tensor: gs.Tensor) -> bool:
        return any(consumer.name in self._members for consumer in tensor.outputs)

    def _find(self, name: str) -> str:
        while self._parent.get(name, name) != name:
            name = self._parent[name]
        return name

    def _union(self, first: str, second: str) -> None:
        self._parent.setdefault(first, first)
        self._parent.setdefault(second, second)
        self._parent[self._find(second)] = self._find(first)
