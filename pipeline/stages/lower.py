"""Lower: the opset and IR version that the content needs and the target can run, and a note of what made it."""

from __future__ import annotations

import json
from collections.abc import Iterable

from ...calibrate.qarray import Spec
from ..graph import Model, check
from ..plan import Plan
from ..recipe import Recipe
from ..targets import TARGETS

PER_CHANNEL_OPSET = 13
BLOCKED_OPSET = 21
IR_OF_OPSET = {13: 7, 15: 8, 19: 9, 21: 10, 23: 11, 24: 12, 25: 13}
"""IR version that came with an opset (ONNX, Versioning); a newer one would shut out older runtimes for nothing."""


def needed_opset(specs: Iterable[Spec], start: int) -> int:
    """Return the lowest opset, not below ``start``, that can express all specs."""
    level = start
    for spec in specs:
        level = max(level, spec.format.min_opset)
        if spec.granularity.axis is not None:
            level = max(level, PER_CHANNEL_OPSET)
        if spec.granularity.block_size:
            level = max(level, BLOCKED_OPSET)
    return level


def lower(model: Model, plan: Plan, recipe: Recipe) -> Model:
    """Set versions and metadata and check the structure; ``model`` is changed in place and returned."""
    model.opset = needed_opset((d.spec for d in plan.quantized() if d.spec is not None), model.opset)
    model.ir_version = _ir_version(model)
    kinds = {d.form for d in plan.quantized()}
    model.metadata.update(
        {
            "qpipe.target": plan.target,
            "qpipe.scheme": recipe.scheme,
            "qpipe.recipe": json.dumps(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=True),
            "qpipe.recipe_hash": plan.recipe_hash,
            "qpipe.source_hash": plan.model_hash,
            "qpipe.forms": ",".join(sorted(kinds)),
        }
    )
    check(model, after="lower")
    return model


def runs_on_target(model: Model, target: str) -> bool:
    """Whether the target has kernels for the model's opset."""
    return model.opset <= TARGETS.get(target).opset_ceiling


def _ir_version(model: Model) -> int:
    """Return the lowest IR version that the opset goes with; an older model keeps its own."""
    needed = max((ir for opset, ir in IR_OF_OPSET.items() if opset <= model.opset), default=model.ir_version)
    ceiling = IR_OF_OPSET[max(IR_OF_OPSET)]
    return needed if model.ir_version > ceiling else max(needed, model.ir_version)
