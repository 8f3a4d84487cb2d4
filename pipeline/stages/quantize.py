"""Quantize: decide, solve, weights, insert and lower in a row. What `qpipe quantize` and the Python interface call."""

from __future__ import annotations

from dataclasses import dataclass

from ...calibrate.errors import ModelError
from ...calibrate.qarray import QArray
from ..calibration import Calibration
from ..forms import Workbench
from ..graph import Model
from ..plan import Plan, Site
from ..recipe import Recipe, make_recipe
from .decide import decide
from .insert import insert
from .lower import lower
from .solve import Key, Solved, solve
from .weights import quantize_weights, settle_nonfinite

QUANTIZED_OPS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger"}
    | {"ConvInteger", "MatMulNBits", "MatMulBnb4", "OutlierMatMul", "QAttention", "QGemm", "MatMulIntegerToFloat"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What came out.

    Attributes:
        model: The quantized model, ready to be saved.
        plan: What was decided.
        activations: Ranges and scales of activations.
        weights: Codes of weights.
    """

    model: Model
    plan: Plan
    activations: dict[Key, Solved]
    weights: dict[Site, QArray]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """What is tolerated.

    Attributes:
        skip_nonfinite: Leave a layer whose weights are not finite in float, instead of refusing the model.
        requantize: Accept a model that holds quantized operators, and quantize what is float in it.
    """

    skip_nonfinite: bool = False
    requantize: bool = False


def needs_statistics(recipe: Recipe) -> bool:
    """Whether a recipe gives some activation a static scale."""
    parts = [recipe, *(make_recipe(scheme=entry.scheme) for entry in recipe.layers)]
    return any(part.activations is not None and not part.activations.dynamic for part in parts)


def quantize_model(
    model: Model,
    recipe: Recipe,
    calibration: Calibration | None = None,
    *,
    model_hash: str = "",
    options: QuantizeOptions = QuantizeOptions(),
) -> Quantized:
    """Quantize a prepared model in place.

    Args:
        model: Float model, after `prepare`.
        recipe: What the user asks.
        calibration: Statistics of the model's activations; None when the recipe needs none.
        model_hash: Recorded in plan and metadata.
        options: What is tolerated.

    Raises:
        ModelError: The model is quantized already, or holds weights that are not finite.
    """
    if not options.requantize:
        refuse_quantized(model)
    plan = decide(model.graph, recipe, calibration, model_hash)
    plan = settle_nonfinite(model.graph, plan, skip=options.skip_nonfinite)
    activations = solve(plan, calibration, recipe.method)
    weights = quantize_weights(model.graph, plan, calibration)
    bench = Workbench(graph=model.graph, activations={key: s.params for key, s in activations.items()}, weights=weights)
    insert(plan, bench)
    return Quantized(model=lower(model, plan, recipe), plan=plan, activations=activations, weights=weights)


def refuse_quantized(model: Model) -> None:
    """Refuse a model that is quantized already.

    Raises:
        ModelError: It holds quantized operators; quantizing codes again would only lose more.
    """
    found = sorted({node.op for node in model.graph.nodes if node.op in QUANTIZED_OPS})
    if found:
        raise ModelError(
            "the model is quantized already",
            where=str(model.path or "model in memory"),
            found=", ".join(found),
            expected="a float model",
            do="start from the float model, or pass --requantize to quantize what is still float",
        )
