"""Needed: the tensors whose statistics a recipe asks for; each of the others would only cost time to observe.

They are found by deciding as `decide` will, with statistics that make every tensor fit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ...calibrate.stats.histogram import Histogram
from ..calibration import Calibration, TensorStats
from ..graph import all_graphs
from ..recipe import Recipe, make_recipe
from ..targets import TARGETS
from .decide import decide, wanted_tensors
from .details import wanted_details


def needed_tensors(
    graph: gs.Graph, recipe: Recipe | None = None, functions: Collection[onnx.FunctionProto] = ()
) -> list[str]:
    """Return the tensors to collect, in topological order.

    Args:
        graph: Prepared float graph.
        recipe: What the statistics are for; None for the default scheme on every target.
        functions: Model-local functions, which are kept as they are.

    Raises:
        RecipeError: A pattern of the recipe matches no node.
    """
    wanted = wanted_tensors(graph)
    if recipe is not None and recipe.float_type == "float16":
        return wanted
    recipes = _one_per_kind_of_target() if recipe is None else [recipe]
    needed = set(wanted_details(graph, "channels"))
    # What a body computes tells whether it ran.
    needed |= {t.name for inner in all_graphs(graph) if inner is not graph for n in inner.nodes for t in n.outputs}
    for each in recipes:
        needed |= _coded(graph, each, wanted, functions)
    return [name for name in wanted if name in needed]


def _one_per_kind_of_target() -> Iterable[Recipe]:
    """Return the default recipe for targets, one for those that store the same tensors as codes."""
    kinds = {
        (t.kernels, t.needs_output, t.fuses_relu, t.static_attention, t.activation_symmetric): name
        for name, t in TARGETS.items()
    }
    return [make_recipe(target=name) for name in kinds.values()]


def _coded(graph: gs.Graph, recipe: Recipe, wanted: list[str], functions: Collection[onnx.FunctionProto]) -> set[str]:
    """Return the tensors that a recipe stores as codes by scales from statistics."""
    fit = TensorStats(histogram=Histogram.of(np.ones(1, np.float32)))
    plan = decide(graph, recipe, Calibration(tensors=dict.fromkeys(wanted, fit)), functions=functions)
    return {d.site.tensor for d in plan.quantized() if d.site.role in ("activation", "output")}
