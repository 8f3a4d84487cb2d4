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
from .equalize import candidates
from .quantize import runs_in_order
from .sequential import Data, layers_in_order, run_seconds
from .solve import Key, Solved, solve
from .tune import tune


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """One tensor that the equalizer will look at.

    Attributes:
        tensor: Its name.
        layers: Names of the layers that read it.
        folds: Whether a scale goes into what makes it; if not, it takes a Mul.
    """

    tensor: str
    layers: tuple[str, ...]
    folds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRuns:
    """Runs of all data through the model while it is quantized; collecting statistics is not among them.

    Attributes:
        count: How many: two for layer by layer, of the float and the quantized model, and two for correcting biases.
        layers: Layers that are quantized one after the other.
        seconds: What the runs take together, about.
    """

    count: int = 0
    layers: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What is to come.

    Attributes:
        plan: What was decided; that a weight is not finite, or how large it is, is not known yet.
        cost: What it will take, estimated.
        model: The float model.
        calibration: Statistics, None when the recipe needs none.
        method: Calibration method.
        foreseen: What the equalizer will look at.
        runs: Runs of the data, counted in the cost.
    """

    plan: Plan
    cost: Cost
    model: Model
    calibration: Calibration | None
    method: str
    foreseen: tuple[Foreseen, ...] = ()
    runs: DataRuns = DataRuns()

    @property
    def activations(self) -> dict[Key, Solved]:
        """Ranges and scales of activations."""
        return solve(self.plan, self.calibration, self.method)

    @property
    def passes(self) -> dict[str, int]:
        """Passes of the target that would rewrite something -> how many places."""
        return tune(clone(self.model), self.plan.target) if self.plan.quantized() else {}


def preview(
    model: Model,
    recipe: Recipe,
    calibration: Calibration | None,
    folder: Path,
    spent: float,
    data: Data | None = None,
) -> Preview:
    """Decide, and estimate what the decisions cost; the model is not changed.

    Args:
        model: Prepared float model.
        recipe: What the user asks.
        calibration: Statistics; None when the recipe needs none.
        folder: Where the result will be written.
        spent: Seconds since the command began, less what was spent on collecting.
        data: What layers will be run on; None when they will not be.

    Raises:
        QpipeError: As `decide`.
    """
    known = with_moved(model.graph, calibration) if calibration is not None else None
    plan = decide(model.graph, recipe, known, functions=model.functions)
    known = with_constants(model.graph, plan, known) if known is not None else None
    runs = _data_runs(model, plan, recipe, data)
    return Preview(
        plan=plan,
        cost=estimate(model, plan, folder, spent + runs.seconds),
        model=model,
        calibration=known,
        method=recipe.method,
        foreseen=tuple(
            Foreseen(tensor=c.tensor.name, layers=c.layers, folds=c.folds)
            for c in candidates(model.graph, plan, recipe, known)
        ),
        runs=runs,
    )


def _data_runs(model: Model, plan: Plan, recipe: Recipe, data: Data | None) -> DataRuns:
    if data is None:
        return DataRuns()
    layers = layers_in_order(model.graph, plan) if runs_in_order(recipe) else 0
    count = 2 * bool(layers) + 2 * recipe.bias_correction
    return DataRuns(count=count, layers=layers, seconds=count * run_seconds(model, data) if count else 0.0)
