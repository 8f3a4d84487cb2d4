"""The Q/DQ checker: what ``onnx.checker`` does not look at (see `checks`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .checks import RULES
from .checks.context import Context
from .checks.targets import TargetTraits, traits_of
from .graph import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A place in a model that breaks a rule.

    Attributes:
        rule: Name of the rule.
        severity: ``"error"`` or ``"warning"``.
        node: Name of the node; nodes of subgraphs and functions with their path before it.
        tensor: Name of the tensor concerned.
        found: What is there.
        expected: What would be right.
        do: What mends it.
    """

    rule: str
    severity: str
    node: str
    tensor: str
    found: str
    expected: str
    do: str

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON data."""
        return asdict(self)


def check_qdq(model: Model, *, target: str | TargetTraits | None = None) -> list[Finding]:
    """Check all Q/DQ nodes of a model, those of subgraphs and functions included; large weights are not read.

    Args:
        model: The model.
        target: Name or demands of a deployment target, None for what holds everywhere.

    Returns:
        Findings, errors before warnings, each group in the order of rule names and then of the graph.

    Raises:
        RecipeError: No target is called so.
    """
    traits = traits_of(target) if isinstance(target, str) else target
    context = Context.of(model, traits)
    findings = [
        Finding(
            rule=name,
            severity=rule.severity,
            node=problem.node,
            tensor=problem.tensor,
            found=problem.found,
            expected=problem.expected,
            do=rule.do,
        )
        for name, rule in RULES.items()
        for problem in rule.check(context)
    ]
    return sorted(findings, key=lambda finding: finding.severity)
