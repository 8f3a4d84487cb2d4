"""Preview: the plan of a quantization and what carrying it out will take, with next to no weight looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..calibration import Calibration
from ..estimate import Cost, estimate
from ..graph import Model, clone
from ..plan import Plan
from ..recipe import Recipe
from ..statistics import with_constants, with_moved
from .decide import decide
from .solve import Key, Solved, solve
from .tune import tune


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What is to come.

    Attributes:
        plan: What was decided; that a weight is not finite, or how large it is, is not known yet.
        cost: What it will take, estimated.
        model: The float model.
        calibration: Statistics, None when the recipe needs none.
        method: Calibration method.
    """

    plan: Plan
    cost: Cost
    model: Model
    calibration: Calibration | None
    method: str

    @property
    def activations(self) -> dict[Key, Solved]:
        """Ranges and scales of activations."""
        return solve(self.plan, self.calibration, self.method)

    @property
    def passes(self) -> dict[str, int]:
        """Passes of the target that would rewrite something -> how many places."""
        return tune(clone(self.model), self.plan.target) if self.plan.quantized() else {}


def preview(model: Model, recipe: Recipe, calibration: Calibration | None, folder: Path, spent: float) -> Preview:
    """Decide, and estimate what the decisions cost; the model is not changed.

    Args:
        model: Prepared float model.
        recipe: What the user asks.
        calibration: Statistics; None when the recipe needs none.
        folder: Where the result will be written.
        spent: Seconds since the command began, less what was spent on collecting.

    Raises:
        QpipeError: As `decide`.
    """
    known = with_moved(model.graph, calibration) if calibration is not None else None
    plan = decide(model.graph, recipe, known, functions=model.functions)
    known = with_constants(model.graph, plan, known) if known is not None else None
    cost = estimate(model, plan, folder, spent)
    return Preview(plan=plan, cost=cost, model=model, calibration=known, method=recipe.method)
