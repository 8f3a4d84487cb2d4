"""Floats: which nodes of what is not quantized are stored in half precision, and why the others are not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...calibrate.errors import RecipeError
from ...calibrate.formats import FORMATS
from ...calibrate.qarray import Spec
from ..calibration import Calibration
from ..constants import QUANTIZABLE, dtype_name, weight_of
from ..graph import Model, all_graphs, clone, values
from ..plan import Decision, Plan, Site
from ..precision import HALVES, border_types, half_nodes, operands_of, widen
from ..recipe import Recipe
from ..targets import TARGETS, Target
from .prepare import infer_types

_UNKNOWN = "is not among the statistics"


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The float types that a model came with.

    Attributes:
        nodes: Nodes that computed in half precision, with their type.
        border: Float inputs and outputs with their type.
    """

    nodes: Mapping[str, str] = field(default_factory=dict)
    border: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: gs.Graph) -> Given:
        """Look at a graph before it is widened to float32."""
        return cls(nodes=half_nodes(graph), border=border_types(graph))


def float32_twin(model: Model) -> Model:
    """Return a model that computes the same in float32, for runtimes without bfloat16; others come back as they are.

    Names stay, so what is measured in the twin holds for the model: float32 holds every bfloat16.
    """
    if "bfloat16" not in half_nodes(model.graph).values():
        return model
    twin = clone(model)
    infer_types(twin)
    widen(twin.graph)
    return twin


def without_bfloat16(batch: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Return a batch with its bfloat16 arrays in float32."""
    return {n: a.astype(np.float32) if a.dtype == ml_dtypes.bfloat16 else a for n, a in batch.items()}


def require_float_type(recipe: Recipe) -> None:
    """Refuse a conversion to a type that the target does not run.

    Raises:
        RecipeError: It does not.
    """
    target = TARGETS.get(recipe.target)
    if recipe.float_type is not None and recipe.float_type not in target.float_types:
        fitting = [n for n, t in TARGETS.items() if recipe.float_type in t.float_types]
        raise RecipeError(
            f"the target {target.name} has no {recipe.float_type} operators",
            found=f"float_type: {recipe.float_type}",
            expected=", ".join(sorted(target.float_types)),
            do=f"use --target with one of: {', '.join(fitting)}",
        )


def border_of(recipe: Recipe, given: Given) -> dict[str, str]:
    """Return the types that the inputs and outputs of the result have."""
    if recipe.float_type is None or recipe.keep_io:
        return dict(given.border)
    return dict.fromkeys(given.border, recipe.float_type)


def with_floats(graph: gs.Graph, plan: Plan, recipe: Recipe, calibration: Calibration | None, given: Given) -> Plan:
    """Return a plan with decisions on which nodes are stored in half precision.

    Args:
        graph: Prepared graph, all in float32.
        plan: What else was decided.
        recipe: Its ``float_type`` holds for all nodes; without one, each keeps the type that it came with.
        calibration: Ranges, which float16 may not hold.
        given: The types that the model came with.

    """
    if recipe.float_type is None and not given.nodes:
        return plan
    target = TARGETS.get(plan.target)
    quantized = {d.site.node for d in plan.quantized()}
    judge = _Judge(opset=int(graph.opset), target=target, calibration=calibration, quantized=quantized)
    made: dict[str, Decision] = {}
    for node in (node for inner in all_graphs(graph) for node in inner.nodes):
        kind = recipe.float_type or given.nodes.get(node.name, "float32")
        if kind not in HALVES or not any(dtype_name(t) in QUANTIZABLE for t in (*node.inputs, *node.outputs)):
            continue
        why = judge.refusal(node, kind, fits=given.nodes.get(node.name) == kind)
        spec = None if why else Spec(format=FORMATS.get(kind))
        site = Site(node=node.name, slot="", tensor="", role="node")
        reason = why or f"computed and stored as {kind}"
        made[node.name] = Decision(site=site, op=node.op, spec=spec, reason=reason, form="cast")
    places = {d.site.node: place for place, d in reversed(list(enumerate(plan.decisions)))}
    decisions = sorted([*plan.decisions, *made.values()], key=lambda d: places.get(d.site.node, len(places)))
    return dataclasses.replace(plan, decisions=tuple(decisions))


def float_notes(plan: Plan, recipe: Recipe, calibration: Calibration | None, given: Given) -> list[str]:
    """Return what a user should be told about the float types of the result."""
    target = TARGETS.get(recipe.target)
    kinds = {recipe.float_type} if recipe.float_type else set(given.nodes.values())
    notes = [
        f"the model keeps {kind}, which {target.name} has no operators for: it will not run there"
        for kind in sorted(kinds & HALVES)
        if kind not in target.float_types
    ]
    if "float16" in kinds and calibration is None and recipe.float_type is not None:
        notes.append("no statistics were given: whether activations exceed float16 (65504) was not looked up")
    unknown = sum(_UNKNOWN in d.reason for d in plan.decisions)
    if unknown:
        notes.append(
            f"{unknown} nodes stay in float32, for the statistics lack ranges of theirs: give the data itself, or "
            "collect with qpipe calibrate --tensors all"
        )
    return notes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judge:
    """Says why nodes stay in float32."""

    opset: int
    target: Target
    calibration: Calibration | None
    quantized: set[str]

    def refusal(self, node: gs.Node, kind: str, *, fits: bool = False) -> str:
        """Return why a node stays in float32, ``""`` when it need not.

        Args:
            node: In the prepared graph.
            kind: What it would become.
            fits: It came in that type, so that its values are known to be such.
        """
        if node.name in self.quantized and not self.target.half_scales:
            return f"float32 around codes: the integer kernels of {self.target.name} give float32"
        if node.op in self.target.float32_ops:
            return f"float32: {self.target.name} has no {kind} kernel for {node.op} and would take it apart"
        operands = operands_of(node, self.opset)
        if operands is None or not operands.takes(kind):
            return f"float32: {node.op} takes no {kind} at opset {self.opset}, or its type is set otherwise"
        if kind != "float16" or fits:
            return ""
        return next((why for t in (*node.inputs, *node.outputs) if (why := self._range(t))), "")

    def _range(self, tensor: gs.Tensor) -> str:
        if dtype_name(tensor) not in QUANTIZABLE:
            return ""
        weight = weight_of(tensor)
        if weight is not None:
            return _constant_range(weight.constant)
        if self.calibration is None:
            return ""
        if tensor.name not in self.calibration.tensors:
            return f"float32: the range of {tensor.name!r} {_UNKNOWN}"
        extrema = self.calibration.tensors[tensor.name].histogram.extrema
        if extrema.sentinel or extrema.nonfinite:
            return f"float32: {tensor.name!r} holds mask values that float16 cannot"
        largest = float(FORMATS.get("float16").qmax)
        if extrema.amax > largest:
            return f"float32: {tensor.name!r} reaches {extrema.amax:.6g}, beyond float16 ({largest:g})"
        return ""


def _constant_range(tensor: gs.Constant) -> str:
    info = np.finfo(np.float16)
    magnitudes = np.abs(np.asarray(values(tensor), dtype=np.float32))
    largest = float(magnitudes.max(initial=0))
    if largest > float(info.max) or not np.isfinite(largest):
        return f"float32: its constant {tensor.name!r} reaches {largest:.6g}, beyond float16 ({float(info.max):g})"
    if 0 < largest < float(info.smallest_normal):
        return f"float32: its constant {tensor.name!r} (at most {largest:.3g}) vanishes in float16"
    return ""
