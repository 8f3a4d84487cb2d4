"""Quantize: decide, solve, weights, insert and lower in a row. What `qpipe quantize` and the Python interface call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...calibrate.errors import ModelError
from ...calibrate.qarray import QArray
from ...calibrate.weights import WEIGHT_METHODS
from ..calibration import Calibration
from ..forms import Workbench
from ..forms.cast import narrow
from ..forms.counters import expose_counters
from ..graph import Model, all_graphs
from ..plan import Plan, Site
from ..precision import widen
from ..recipe import AUTO, Recipe
from ..statistics import with_constants, with_moved
from ..targets import TARGETS
from . import choice
from .correct_biases import correct_biases, give_biases
from .decide import decide
from .equalize import Equalized, equalize, kept_of, needs_of
from .floats import Given, border_of, float_notes, require_float_type, with_floats
from .insert import insert
from .lower import lower, needed_opset, opset_note
from .prepare import prepare
from .sequential import Data, quantize_in_order
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
        equalized: Tensors that were divided by a scale per channel.
        corrected: Layers whose bias takes back what quantizing adds to their mean output.
        notes: What could not be seen before the numbers were there, and a user should know.
    """

    model: Model
    plan: Plan
    activations: dict[Key, Solved]
    weights: dict[Site, QArray]
    passes: dict[str, int] = field(default_factory=dict)
    equalized: tuple[Equalized, ...] = ()
    corrected: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """What is tolerated, and what may be run.

    Attributes:
        skip_nonfinite: Leave a layer whose weights are not finite in float, instead of refusing the model.
        requantize: Accept a model that holds quantized operators, and quantize what is float in it.
        data: What layers are run on when they are quantized one after the other; None where there are statistics only.
    """

    skip_nonfinite: bool = False
    requantize: bool = False
    data: Data | None = None


def runs_in_order(recipe: Recipe) -> bool:
    """Whether a recipe quantizes layer by layer where there is data."""
    return any(
        _looks_at_inputs(part) and part.weights is not None and part.weights.sequential for part in _parts(recipe)
    )


def runs_layers(recipe: Recipe) -> bool:
    """Whether a recipe runs layers on data while it quantizes."""
    return recipe.bias_correction or runs_in_order(recipe)


def needs_statistics(recipe: Recipe, *, in_order: bool = False) -> bool:
    """Whether a recipe asks for something that only data can tell: static scales, outlier columns, input statistics.

    Args:
        recipe: With no algorithm ``auto`` in it, see `Recipe.settled`.
        in_order: Layers are quantized one after the other, which looks at their inputs itself.
    """
    return needed_detail(recipe, in_order=in_order) != "none" or any(
        part.activations is not None and not part.activations.dynamic for part in _parts(recipe)
    )


def profits_from_statistics(recipe: Recipe, *, in_order: bool = False) -> bool:
    """Whether statistics make the result better, or are needed: float16 looks up which ranges it cannot hold."""
    return needs_statistics(recipe, in_order=in_order) or recipe.float_type == "float16"


def needed_detail(recipe: Recipe, *, in_order: bool = False) -> str:
    """Return what a recipe needs to know, or profits from, of layer inputs beside histograms; see `stages.details`."""
    needs = {need for part in _parts(recipe) for need in _needs(part, in_order=in_order)}
    if "gram" in needs or "auto" in needs:
        return "gram" if "gram" in needs else "auto"
    return "channels" if needs else "none"


def _parts(recipe: Recipe) -> list[Recipe]:
    return [recipe, *(entry.recipe() for entry in recipe.layers)]


def _looks_at_inputs(recipe: Recipe) -> frozenset[str]:
    return WEIGHT_METHODS.resolve(recipe.weights.method).needs if recipe.weights is not None else frozenset()


def _needs(recipe: Recipe, *, in_order: bool) -> set[str]:
    needs = {"channels"} if recipe.form == "outlier" and recipe.outliers.looks_at_data else set()
    if recipe.weights is not None and not (in_order and recipe.weights.sequential):
        needs |= _looks_at_inputs(recipe)
    if choice.wants_data(recipe):
        needs |= {"auto"} if recipe.weights is not None and not recipe.weights.algorithm else set()
        needs |= {"channels"} if recipe.equalize == AUTO else set()
    return needs | needs_of(recipe)


def quantize_model(
    model: Model,
    recipe: Recipe,
    calibration: Calibration | None = None,
    *,
    options: QuantizeOptions = QuantizeOptions(),
) -> Quantized:
    """Quantize a prepared model.

    Args:
        model: Float model, after `prepare`; used up.
        recipe: What the user asks.
        calibration: Statistics of the model's activations; None when the recipe needs none.
        options: What is tolerated.

    Raises:
        DataError: The recipe needs statistics and there are none.
        ModelError: The model is quantized already, or holds weights that are not finite.
        UnsupportedError: The number types need a higher opset, and the model cannot be brought to it.
    """
    recipe = recipe.settled(
        knows_inputs=options.data is not None or (calibration is not None and has_grams(calibration))
    )
    if not options.requantize:
        refuse_quantized(model)
    require_float_type(recipe)
    given = Given.of(model.graph)
    if given.nodes:
        widen(model.graph)
    calibration = with_moved(model.graph, calibration) if calibration is not None else None
    if recipe.bias_correction:
        give_biases(model.graph)

    def plan_of(model: Model, kept: Mapping[str, str] | None = None) -> Plan:
        plan = decide(model.graph, recipe, calibration, model.functions, kept)
        return with_floats(model.graph, plan, recipe, calibration, given)

    plan = plan_of(model)
    if needed_opset(plan, model.opset) > model.opset:
        model = prepare(move_opset(model, needed_opset(plan, model.opset)))
        plan = plan_of(model)
    equalized, calibration = equalize(model.graph, plan, recipe, calibration)
    plan = plan_of(model, kept_of(equalized)) if equalized else plan
    plan = settle_global(model.graph, settle_nonfinite(model.graph, plan, skip=options.skip_nonfinite))
    calibration = with_constants(model.graph, plan, calibration) if calibration is not None else None
    activations = solve(plan, calibration, recipe.method)
    in_order = options.data is not None and runs_in_order(recipe)
    weights = _weights(model, plan, calibration, options.data if in_order else None)
    corrected = correct_biases(model, plan, options.data, activations, weights) if recipe.bias_correction else 0
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
    if recipe.outliers.counter and (counted := expose_counters(bench)):
        model.metadata["qpipe.new_outliers"] = ", ".join(counted)
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
        equalized=tuple(equalized),
        corrected=corrected,
        notes=(
            *float_notes(plan, recipe, calibration, given),
            *bench.notes,
            *_order_notes(recipe, in_order=in_order),
            *opset_note(lowered, plan.target),
        ),
    )


def has_grams(calibration: Calibration) -> bool:
    """Whether the inputs of layers are known as weight algorithms want them."""
    return any(stats.gram is not None for stats in calibration.tensors.values())


def _weights(model: Model, plan: Plan, calibration: Calibration | None, data: Data | None) -> dict[Site, QArray]:
    if data is None:
        return quantize_weights(model.graph, plan, calibration)
    return quantize_in_order(model, plan, data, calibration)


def _order_notes(recipe: Recipe, *, in_order: bool) -> list[str]:
    if in_order or not runs_in_order(recipe) or recipe.weights is None:
        return []
    return [
        f"{recipe.weights.method} looked at the inputs of the float model's layers, which is what a statistics file "
        "holds; with --data each layer is quantized behind the quantized ones before it"
    ]


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
