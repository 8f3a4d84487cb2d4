"""Lower: the opset and IR version that the content needs and the target can run, and a note of what made it."""

from __future__ import annotations

import json

import onnx_graphsurgeon as gs
from onnx import GraphProto

from ...calibrate.errors import UnsupportedError
from ..ceilings import measure
from ..graph import Model, all_graphs, check, clone
from ..graph.importer import NodeOrigin, file_name_of
from ..plan import Plan
from ..recipe import Recipe
from ..targets import TARGETS
from .context import NARROW_SCALE_OPSET, PER_CHANNEL_OPSET
from .upgrade import move_opset

BLOCKED_OPSET = 21
OPSET_OF_FORM = {"dynamic": 11, "nbits": 10, "bnb4": 10, "lookup": 10, "outlier": 15, "recurrent": 10}
"""Opset of the operators of a form that stores codes as plain bytes; others need what their number types need."""
IR_OF_OPSET = {10: 5, 11: 6, 12: 7, 13: 7, 15: 8, 19: 9, 21: 10, 23: 11, 24: 12, 25: 13}
"""IR version that came with an opset (ONNX, Versioning); a newer one would shut out older runtimes for nothing."""
_WEIGHTS_AS_INPUTS_IR = 3
"""Last IR version in which every initializer had to be listed among the inputs."""


def needed_opset(plan: Plan, start: int) -> int:
    """Return the lowest opset, not below ``start``, that can express what a plan stores."""
    level = max([start, *(OPSET_OF_FORM.get(d.form, start) for d in plan.quantized())])
    for spec in [d.spec for d in plan.quantized() if d.spec is not None and d.form not in OPSET_OF_FORM]:
        narrow_scales = spec.format.scale_format in TARGETS.get(plan.target).scale_formats
        level = max(level, spec.format.min_opset if narrow_scales else spec.format.plain_opset or spec.format.min_opset)
        if spec.granularity.axis is not None:
            level = max(level, PER_CHANNEL_OPSET)
        if spec.granularity.block_size:
            level = max(level, BLOCKED_OPSET)
    halves = {d.site.node for d in plan.quantized() if d.form == "cast"}
    scaled = any(d.form == "qdq" and d.site.node in halves for d in plan.quantized())
    return max(level, NARROW_SCALE_OPSET) if scaled else level


def lower(model: Model, plan: Plan, recipe: Recipe) -> Model:
    """Return ``model`` with versions and metadata set, its structure checked.

    An opset above what the target has kernels for is lowered where possible; else it stays, and `opset_note` says so.
    """
    if not runs_on_target(model, plan.target):
        model = _below(model, TARGETS.get(plan.target).opset_ceiling)
    model.ir_version, old = _ir_version(model), model.ir_version
    if old <= _WEIGHTS_AS_INPUTS_IR:
        _unlist_weights(model)
    _tell_apart(model.graph)
    kinds = {d.form for d in plan.quantized()}
    model.metadata.update(
        {
            "qpipe.target": plan.target,
            "qpipe.scheme": recipe.scheme,
            "qpipe.recipe": json.dumps(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=True),
            "qpipe.recipe_hash": plan.recipe_hash,
            "qpipe.forms": ",".join(sorted(kinds)),
        }
    )
    check(model, after="lower")
    return model


def runnable(model: Model) -> Model:
    """Return a model that the installed ONNX Runtime reads: one of a newer opset at the one that it knows, if possible.

    Names of tensors stay, so what is measured in the result holds for the model. Others come back as they are.
    """
    is_new = model.opset > max(IR_OF_OPSET) or model.ir_version > IR_OF_OPSET[max(IR_OF_OPSET)]
    if not is_new and not _named_alike(model.graph):
        return model
    known = (measure()["max_opset"] or model.opset) if is_new else model.opset
    result = _below(model, known) if model.opset > known else clone(model)
    result.ir_version = _ir_version(result) if is_new else result.ir_version
    _tell_apart(result.graph)
    return result


def _named_alike(graph: gs.Graph) -> list[gs.Node]:
    """Return the nodes whose name in the file another node before them has, which ONNX Runtime refuses."""
    seen: set[str] = set()
    found = []
    for node in (node for inner in all_graphs(graph) for node in inner.nodes):
        name = file_name_of(node)
        if name and name in seen:
            found.append(node)
        seen.add(name)
    return found


def _tell_apart(graph: gs.Graph) -> None:
    """Let nodes that the file names alike be written under their names of their own."""
    for node in _named_alike(graph):
        node.origin = NodeOrigin("", node.origin.proto)


def runs_on_target(model: Model, target: str) -> bool:
    """Whether the target has kernels for the model's opset."""
    return model.opset <= TARGETS.get(target).opset_ceiling


def opset_note(model: Model, target: str) -> tuple[str, ...]:
    """Return what a user should know of an opset that the target has no kernels for."""
    if runs_on_target(model, target):
        return ()
    ceiling = TARGETS.get(target).opset_ceiling
    text = f"opset {model.opset} stays, beyond what {target} has kernels for (opset {ceiling}): an operator is newer"
    return (f"{text}; only a newer runtime runs the model",)


def _below(model: Model, ceiling: int) -> Model:
    try:
        return move_opset(model, ceiling)
    except UnsupportedError:
        return model


def _ir_version(model: Model) -> int:
    """Return the lowest IR version that the opset goes with; an older model keeps its own, from 4 on."""
    needed = max((ir for opset, ir in IR_OF_OPSET.items() if opset <= model.opset), default=model.ir_version)
    ceiling = IR_OF_OPSET[max(IR_OF_OPSET)]
    return needed if model.ir_version > ceiling else max(needed, model.ir_version, _WEIGHTS_AS_INPUTS_IR + 1)


def _unlist_weights(model: Model) -> None:
    """Take weights out of the inputs, where the old format listed them: today that means they may be overridden."""
    for graph in all_graphs(model.graph):
        origin = vars(graph).get("origin")
        if origin is not None:
            rest = GraphProto()
            rest.CopyFrom(origin)
            rest.ClearField("input")
            vars(graph)["origin"] = rest
