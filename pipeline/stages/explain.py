"""Explain: what a float model would become and what became of a quantized one, with evidence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...calibrate.errors import DataError, QpipeError
from ..calibration import Calibration
from ..data import inputs_of, random_batches
from ..fusion import Evidence
from ..fusion.engines import ENGINES
from ..graph import Model, all_graphs, load
from ..plan import Plan
from ..recipe import Recipe
from ..targets import TARGETS
from ..workflow import Job
from .quantize import QUANTIZED_OPS, needed_detail, needs_statistics

RANDOM_SAMPLES = 2
"""Samples that give scales where none are known: what fuses depends on where codes are, not on their scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What is known of a model.

    Attributes:
        target: Name of the target.
        plan: What a float model would become; None for a quantized one.
        passes: Passes of the target that would rewrite something in a float model -> how many places.
        evidence: What the target's runtime makes of the quantized model.
        random: Whether scales came from random numbers.
    """

    target: str
    plan: Plan | None
    evidence: Evidence
    passes: dict[str, int]
    random: bool = False


def is_quantized(model: Model) -> bool:
    """Whether a model holds quantized operators."""
    return any(node.op in QUANTIZED_OPS for inner in all_graphs(model.graph) for node in inner.nodes)


def explain_quantized(path: Path, target: str) -> Explanation:
    """Ask the target's runtime what it makes of a quantized file.

    Raises:
        QpipeError: The runtime is missing, or does not run the model.
    """
    found = ENGINES[TARGETS.get(target).evidence](load(path), path)
    return Explanation(target=target, plan=None, evidence=found, passes={})


def explain_float(path: Path, recipe: Recipe, calibration: Calibration | None = None) -> Explanation:
    """Quantize a float model in memory and ask the target's runtime what it makes of the result.

    Args:
        path: The model.
        recipe: What would be done to it.
        calibration: Statistics; without them, and where the recipe needs some, the model is run on random numbers.

    Raises:
        DataError: It does not run on random numbers.
        QpipeError: As `Job.quantize`; or the runtime is missing.
    """
    job = Job.open(path)
    random = calibration is None and needs_statistics(recipe)
    if random:
        calibration = _random_statistics(job, recipe)
    result = job.quantize(recipe, calibration)
    found = ENGINES[TARGETS.get(recipe.target).evidence](result.model, None)
    return Explanation(target=recipe.target, plan=result.plan, evidence=found, passes=result.passes, random=random)


def _random_statistics(job: Job, recipe: Recipe) -> Calibration:
    try:
        batches = random_batches(inputs_of(job.model.graph), RANDOM_SAMPLES)
        return job.collect(batches, detail=needed_detail(recipe), tensors=job.needed(recipe))
    except QpipeError as error:
        raise DataError(
            "the model does not run on random numbers, from which it would get scales to be explained with",
            where=str(job.path),
            found=error.what,
            expected="statistics of real data",
            do=f"qpipe calibrate {job.path} --data DATA -o model.qcal, then add --calib model.qcal",
        ) from error
