"""Quantize: decide, solve, weights, insert and lower in a row. What `qpipe quantize` and the Python interface call."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...calibrate.equalize import EQUALIZERS
from ...calibrate.errors import ModelError
from ...calibrate.qarray import QArray
from ...calibrate.weights import WEIGHT_METHODS
from ..calibration import Calibration
from ..forms import Workbench
from ..forms.cast import narrow
from ..graph import Model, all_graphs
from ..plan import Plan, Site
from ..precision import widen
from ..recipe import Recipe
from ..statistics import with_constants, with_moved
from ..targets import TARGETS
from .decide import decide
from .floats import Given, border_of, float_notes, require_float_type, with_floats
from .insert import insert
from .lower import lower, needed_opset, opset_note
from .prepare import prepare
from .solve import Key, Solved, solve
from .tune import tune
from .upgrade import move_opset
from .weights import quantize_weights, settle_global, settle_nonfinite

QUANTIZED_OPS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger"}
    | {
        "ConvInteger",
        "MatMulNBits",
        "MatMulBnb4",
        "OutlierMatMul",
        "DynamicQuantizeLSTM",
        "QAttention",
        "QGemm",
        "MatMulIntegerToFloat",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What came out.

    Attributes:
        model: The quantized model, ready to be saved.
        plan: What was decided.
        activations: Ranges and scales of activations.
        weights: Codes of weights.
        passes: Passes of the target that rewrote something -> how many places.
        notes: What could not be seen before the numbers were there, and a user should know.
    """

    model: Model
    plan: Plan
    activations: dict[Key, Solved]
    weights: dict[Site, QArray]
    passes: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


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
    """Whether a recipe asks for something that only data can tell: static scales, outlier columns, input statistics."""
    parts = [recipe, *(entry.recipe() for entry in recipe.layers)]
    return needed_detail(recipe) != "none" or any(
        part.activations is not None and not part.activations.dynamic for part in parts
    )


def profits_from_statistics(recipe: Recipe) -> bool:
    """Whether statistics make the result better, or are needed: float16 looks up which ranges it cannot hold."""
    return needs_statistics(recipe) or recipe.float_type == "float16"


def needed_detail(recipe: Recipe) -> str:
    """Return what a recipe needs to know of layer inputs beside their histograms; see `stages.details`."""
    parts = [recipe, *(entry.recipe() for entry in recipe.layers)]
    needs = {need for part in parts for need in _needs(part)}
    return "gram" if "gram" in needs else "channels" if needs else "none"


def _needs(recipe: Recipe) -> set[str]:
    needs = {"channels"} if recipe.form == "outlier" and recipe.outliers.looks_at_data else set()
    if recipe.weights is not None and recipe.weights.algorithm:
        needs |= WEIGHT_METHODS.resolve(recipe.weights.algorithm).needs
    if recipe.equalize:
        needs |= EQUALIZERS.resolve(recipe.equalize).needs
    return needs


def quantize_model(
    model: Model,
    recipe: Recipe,
    calibration: Calibration | None = None,
    *,
    model_hash: str = "",
    options: QuantizeOptions = QuantizeOptions(),
) -> Quantized:
    """Quantize a prepared model.

    Args:
        model: Float model, after `prepare`; used up.
        recipe: What the user asks.
        calibration: Statistics of the model's activations; None when the recipe needs none.
        model_hash: Recorded in plan and metadata.
        options: What is tolerated.

    Raises:
        DataError: The recipe needs statistics and there are none.
        ModelError: The model is quantized already, or holds weights that are not finite.
        UnsupportedError: The number types need a higher opset, and the model cannot be brought to it.
    """
    if not options.requantize:
        refuse_quantized(model)
    require_float_type(recipe)
    given = Given.of(model.graph)
    if given.nodes:
        widen(model.graph)
    calibration = with_moved(model.graph, calibration) if calibration is not None else None

    def plan_of(model: Model) -> Plan:
        plan = decide(model.graph, recipe, calibration, model_hash, model.functions)
        return with_floats(model.graph, plan, recipe, calibration, given)

    plan = plan_of(model)
    if needed_opset(plan, model.opset) > model.opset:
        model = prepare(move_opset(model, needed_opset(plan, model.opset)))
        plan = plan_of(model)
    plan = settle_global(model.graph, settle_nonfinite(model.graph, plan, skip=options.skip_nonfinite))
    calibration = with_constants(model.graph, plan, calibration) if calibration is not None else None
    activations = solve(plan, calibration, recipe.method)
    weights = quantize_weights(model.graph, plan, calibration)
    target = TARGETS.get(recipe.target)
    bench = Workbench(
        graph=model.graph,
        activations={key: s.params for key, s in activations.items()},
        weights=weights,
        fuses_relu=target.fuses_relu,
        scale_formats=target.scale_formats,
        accuracy_level=_accuracy_level(recipe),
    )
    insert(plan, bench)
    if given.nodes or recipe.float_type is not None:
        narrow(model.graph, plan, border_of(recipe, given), half_scales=target.half_scales)
    _add_functions(model, bench)
    passes = tune(model, recipe.target) if plan.quantized() else {}
    if calibration is not None:
        model.metadata["qpipe.calibration"] = calibration.origin
    lowered = lower(model, plan, recipe)
    return Quantized(
        model=lowered,
        plan=plan,
        activations=activations,
        weights=weights,
        passes=passes,
        notes=(*float_notes(recipe, calibration, given), *bench.notes, *opset_note(lowered, plan.target)),
    )


def _accuracy_level(recipe: Recipe) -> int:
    given = recipe.weights.accuracy_level if recipe.weights is not None else None
    return TARGETS.get(recipe.target).accuracy_level if given is None else given


def _add_functions(model: Model, bench: Workbench) -> None:
    """Put the operators that the forms brought into the model, in place of older bodies of the same name."""
    for function in bench.functions.values():
        model.functions = [f for f in model.functions if (f.domain, f.name) != (function.domain, function.name)]
        model.functions.append(function)
        model.domains.setdefault(function.domain, 1)


def refuse_quantized(model: Model) -> None:
    """Refuse a model that is quantized already.

    Raises:
        ModelError: It holds quantized operators; quantizing codes again would only lose more.
    """
    found = sorted({node.op for inner in all_graphs(model.graph) for node in inner.nodes if node.op in QUANTIZED_OPS})
    if found:
        raise ModelError(
            "the model is quantized already",
            where=str(model.path or "model in memory"),
            found=", ".join(found),
            expected="a float model",
            do="start from the float model, or pass --requantize to quantize what is still float",
        )
