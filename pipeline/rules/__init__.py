"""Operator rules: what each operator lets quantization do, as data. One engine (`stages.decide`) reads them.

To add an operator, add a line to the file of its family. Operators without a rule are left in float, and said so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import onnx_graphsurgeon as gs

from ...calibrate.registry import Registry

Kind = Literal["weighted", "elementwise", "passthrough", "absorbed", "float"]
AxisOf = Callable[[gs.Node, int], "int | None"]


def no_axis(_node: gs.Node, _rank: int) -> int | None:
    """Axis function of operators whose weight takes one scale only."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRule:
    """How one operator type takes part.

    Attributes:
        op: Operator type.
        kind: ``weighted`` operators multiply by a weight and start a quantized region; ``elementwise`` ones compute on
            codes with a scale of their own; ``passthrough`` ones move codes, so input and output share one scale;
            ``absorbed`` ones vanish into the quantizer behind them; ``float`` ones stay.
        data: Input slots that carry activations; None means all.
        weight: Input slot that may hold a constant weight.
        bias: Input slot of the bias.
        out_axis: Axis of the weight along the output channels, from the node and the weight's rank.
        in_axis: Axis of the weight that is summed over; blocks run along it.
        reason: Why it stays in float, or what it is.
    """

    op: str
    kind: Kind
    data: tuple[int, ...] | None = (0,)
    weight: int | None = None
    bias: int | None = None
    out_axis: AxisOf = no_axis
    in_axis: AxisOf = no_axis
    reason: str = ""

    def data_inputs(self, node: gs.Node) -> list[tuple[int, gs.Tensor]]:
        """Return ``(slot, tensor)`` of the activation inputs that the node really has."""
        slots = range(len(node.inputs)) if self.data is None else self.data
        return [(i, node.inputs[i]) for i in slots if i < len(node.inputs) and not node.inputs[i].is_empty()]


RULES: Registry[OpRule] = Registry("operator rule", __name__)


def add(rule: OpRule) -> None:
    """Register a rule under its operator type."""
    RULES.add(rule.op, rule)
