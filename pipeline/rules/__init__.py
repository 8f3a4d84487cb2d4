"""Operator rules: what each operator lets quantization do, as data. One engine (`stages.decide`) reads them.

To add an operator, add a line to the file of its family. Operators without a rule are left in float, and said so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import onnx_graphsurgeon as gs

from ...calibrate.registry import Registry
from ..graph.queries import STANDARD_DOMAINS

Kind = Literal["weighted", "elementwise", "passthrough", "absorbed", "float"]
AxisOf = Callable[[gs.Node, int], "int | None"]
Condition = Callable[[gs.Node], str]

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""


def no_axis(_node: gs.Node, _rank: int) -> int | None:
    """Axis function of operators whose weight takes one scale only."""
    return None


def never(_node: gs.Node) -> str:
    """Condition of operators that join whatever their attributes are."""
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRule:
    """How one operator type takes part.

    Attributes:
        op: Operator type.
        kind: ``weighted`` operators multiply by a weight and start a quantized region; ``elementwise`` ones compute on
            codes with a scale of their own; ``passthrough`` ones move codes, so input and output share one scale;
            ``absorbed`` ones vanish into the quantizer behind them; ``float`` ones stay.
        domain: Domain of the operator, ``""`` for the standard one.
        data: Input slots that hold the numbers to quantize, constants among them; None means all.
        weight: Input slot that may hold a constant weight with scales of its own.
        further_weights: Input slots of further weights in the same layout, all constant or none quantized.
        bias: Input slot of the bias.
        out_axis: Axis of the weight along the output channels, from the node and the weight's rank.
        in_axis: Axis of the weight that is summed over; blocks run along it.
        unless: Returns why a node stays in float on account of its attributes, ``""`` when it need not.
        reason: Why it stays in float, or what it is.
        source: Where that is written; empty for the operator's own page.
    """

    op: str
    kind: Kind
    domain: str = ""
    data: tuple[int, ...] | None = (0,)
    weight: int | None = None
    further_weights: tuple[int, ...] = ()
    bias: int | None = None
    out_axis: AxisOf = no_axis
    in_axis: AxisOf = no_axis
    unless: Condition = never
    reason: str = ""
    source: str = ""

    def data_inputs(self, node: gs.Node) -> list[tuple[int, gs.Tensor]]:
        """Return ``(slot, tensor)`` of the inputs that hold numbers to quantize, as far as the node has them."""
        slots = range(len(node.inputs)) if self.data is None else self.data
        return [(i, node.inputs[i]) for i in slots if i < len(node.inputs) and not node.inputs[i].is_empty()]


RULES: Registry[OpRule] = Registry("operator rule", __name__)


def add(rule: OpRule) -> None:
    """Register a rule under its operator type, ``domain::type`` outside of the standard domain."""
    RULES.add(f"{rule.domain}::{rule.op}" if rule.domain else rule.op, rule)


def add_each(ops: Iterable[str], kind: Kind, reason: str, *, domain: str = "") -> None:
    """Register one rule for several operator types of one input."""
    for op in ops:
        add(OpRule(op=op, kind=kind, domain=domain, reason=reason))


def rule_of(node: gs.Node) -> OpRule | None:
    """Return the rule of a node; an operator of another domain is another operator, whatever its name."""
    domain = node.domain or ""
    key = node.op if domain in STANDARD_DOMAINS else f"{domain}::{node.op}"
    return RULES.get(key) if key in RULES else None
