"""What was decided: pure data, printed by a dry run, stored beside the result, diffable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..calibrate.qarray import Spec

ROLES = ("activation", "output", "weight", "bias", "node")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Site:
    """One edge of the graph, named stably.

    Attributes:
        node: Name of the node.
        slot: Position at the node, ``"in0"``, ``"out0"``; ``""`` for the node as a whole.
        tensor: Name of the tensor.
        role: One of `ROLES`.
    """

    node: str
    slot: str
    tensor: str
    role: str

    @property
    def index(self) -> int:
        """Number of the input or output that the slot names."""
        return int(self.slot.lstrip("inout"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What happens at a site. ``spec`` None means left in float, and ``reason`` says why.

    Attributes:
        site: Where.
        op: Operator type of the node.
        spec: How the tensor is stored, or None.
        form: How the graph expresses it (see `Recipe.form`).
        reason: Why, in a sentence that a user understands.
        algorithm: Weight algorithm, e.g. ``gptq:0.01``; empty where the site holds no weight.
        columns: Inputs of a weight that stay in floating point, for the form ``outlier``.
        limit: Amplitude from which a value of another column counts as a new outlier, 0 for never.
    """

    site: Site
    op: str
    spec: Spec | None
    reason: str
    form: str = "qdq"
    algorithm: str = ""
    columns: tuple[int, ...] = ()
    limit: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All decisions of one quantization.

    Attributes:
        decisions: One per considered site, in topological order.
        groups: Tensor name -> name of the tensor whose scale it shares (itself when alone).
        target: Name of the target.
        recipe_hash: Of the recipe.
        model_hash: Of the float model; it is known last.
    """

    decisions: tuple[Decision, ...]
    groups: dict[str, str]
    target: str
    recipe_hash: str
    model_hash: str = ""

    def quantized(self) -> list[Decision]:
        """Return the decisions that quantize."""
        return [d for d in self.decisions if d.spec is not None]

    def coded(self) -> list[Decision]:
        """Return the decisions that store codes, without those on the type of floats."""
        return [d for d in self.quantized() if d.form != "cast"]

    def nodes(self) -> dict[str, Decision]:
        """Return one decision per node: its first that quantizes, else why it is left in float, or in float32."""
        best: dict[str, Decision] = {}
        for decision in self.decisions:
            known = best.get(decision.site.node)
            if known is None or (known.spec is None and (decision.spec is not None or decision.form == "cast")):
                best[decision.site.node] = decision
        return best

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON data."""
        return {
            "schema_version": 1,
            "target": self.target,
            "recipe_hash": self.recipe_hash,
            "model_hash": self.model_hash,
            "decisions": [
                {
                    "node": d.site.node,
                    "op": d.op,
                    "slot": d.site.slot,
                    "tensor": d.site.tensor,
                    "role": d.site.role,
                    "form": d.form,
                    "spec": spec_text(d.spec) if d.spec else None,
                    "algorithm": d.algorithm,
                    "columns": list(d.columns),
                    "reason": d.reason,
                }
                for d in self.decisions
            ],
        }


def spec_text(spec: Spec) -> str:
    """Return a spec in a few words: ``"int8 per channel (axis 0), symmetric, 7 bits"``."""
    granularity = spec.granularity
    if spec.format.lowering == "cast":
        return spec.format.name
    if granularity.axis is None:
        where = "per tensor"
    elif granularity.block_size:
        where = f"blocks of {granularity.block_size} (axis {granularity.axis})"
    else:
        where = f"per channel (axis {granularity.axis})"
    text = f"{spec.format.name} {where}, {'symmetric' if spec.symmetric else 'asymmetric'}"
    if spec.float_zero:
        text += ", float zero points"
    if spec.reduce_bits:
        text += f", {spec.format.bits - spec.reduce_bits} bits"
    return f"{text}, pairs up to {spec.pair_limit}" if spec.pair_limit else text
