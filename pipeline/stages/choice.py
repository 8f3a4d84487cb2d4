"""Which form a node takes, out of recipe and target, and what keeps it from taking that form."""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from ...calibrate.errors import RecipeError
from ...calibrate.formats import FORMATS
from ...calibrate.granularity import per_channel
from ...calibrate.qarray import Spec
from ...calibrate.weights import WEIGHT_METHODS
from ..calibration import TensorStats
from ..constants import Weight, dtype_name, weight_of
from ..layouts import RECURRENT, layout_of
from ..recipe import Recipe, WeightOptions
from ..targets import Target

PACKED_BITS = (4, 8)
"""Bits of the integers that MatMulNBits computes with."""
RECURRENT_STATIC = (
    "recurrent: errors of fixed scales add up from step to step; as a layer (match: op:LSTM) of the recipe it can have "
    "a scheme of its own, w8a8-dynamic, or w8 for its weights alone"
)
BNB4_BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes that MatMulBnb4 computes with."""


def adapt(recipe: Recipe, target: Target) -> Recipe:
    """Return the recipe as the target can run it: activations that it refuses stay in float.

    Raises:
        RecipeError: Recipe and target contradict each other.
    """
    activations, weights = recipe.activations, recipe.weights
    wanted = (activations is not None and activations.symmetric is False) or (
        weights is not None and weights.symmetric is False
    )
    if wanted and not target.asymmetric:
        raise RecipeError(
            f"the target {target.name} has zero points of 0 only",
            found="symmetric: false",
            expected="symmetric codes",
            do="leave symmetric out, or choose another --target",
        )
    if weights is not None and weights.float_zero_points and not target.float_zero_bits:
        raise RecipeError(
            f"the target {target.name} has no MatMulNBits that takes zero points which are no codes",
            found="float_zero_points: true",
            expected="zero points that are codes",
            do="leave float_zero_points out, or choose --target ort-cpu or ort-cuda",
        )
    if activations is not None and activations.dynamic and recipe.form in (None, "dynamic"):
        _require_dynamic(activations.format, activations.symmetric)
    if refused_activations(recipe, target):
        return recipe.model_copy(update={"activations": None})
    return recipe


def _require_dynamic(fmt: str | None, symmetric: bool | None) -> None:
    if fmt not in (None, "uint8") or symmetric:
        raise RecipeError(
            "DynamicQuantizeLinear gives asymmetric uint8 codes only",
            found=f"{fmt or 'uint8'}, {'symmetric' if symmetric else 'asymmetric'}",
            expected="uint8, asymmetric",
            do="leave format and symmetric of the activations out, or dynamic",
        )


def refused_activations(recipe: Recipe, target: Target) -> str:
    """Return why the target does not run activations as the recipe wants them, ``""`` when it does."""
    fmt = recipe.activations.format if recipe.activations is not None else None
    reason = target.refused.get(fmt or "")
    return f"{target.name} does not run {fmt} activations: {reason}" if reason else ""


def form_of(op: str, recipe: Recipe, target: Target) -> str:
    """Return the form of an operator type under an adapted recipe: the recipe's, or what the target runs best."""
    if op in RECURRENT and recipe.form in (None, "dynamic"):
        return "recurrent" if recipe.activations is not None and recipe.activations.dynamic else "qdq"
    if recipe.form is not None:
        return recipe.form
    if recipe.activations is not None:
        return "dynamic" if recipe.activations.dynamic else "qdq"
    if recipe.weights is None:
        return "qdq"
    fmt, weights = FORMATS.get(recipe.weights.format), recipe.weights
    if fmt.lowering == "bnb4":
        return "bnb4"
    packs = fmt.is_integer and fmt.bits in PACKED_BITS and weights.granularity == "block"
    size = weights.block_size
    if packs and size >= 16 and size & (size - 1) == 0 and op in target.forms.get("nbits", ()):
        return "nbits"
    return "qdq"


def algorithm_of(op: str, weights: WeightOptions, *, can_look: bool = True) -> str:
    """Return the algorithm of a weight, ``rtn_mse`` where it asks for inputs that cannot be had.

    Args:
        op: Operator type; of the state of a recurrent one there are no statistics.
        weights: What the recipe says.
        can_look: Whether the node's input is known, or can be: bodies of If, Loop and Scan do not run by themselves.
    """
    blind = op in RECURRENT or not can_look
    return "rtn_mse" if blind and WEIGHT_METHODS.resolve(weights.method).needs else weights.method


def no_kernel(op: str, recipe: Recipe, target: Target) -> str:
    """Return why an operator type stays in float on a target whatever its attributes are, ``""`` when it need not."""
    form = form_of(op, recipe, target)
    if form == "qdq" and recipe.activations is not None:
        without = f"the target {target.name} has no integer kernel for {op}"
        return "" if op in target.kernels else RECURRENT_STATIC if op in RECURRENT else without
    key = "weights" if form == "qdq" else form
    if op in target.forms.get(key, ()):
        return ""
    at_run_time = dict.fromkeys(("dynamic", "recurrent"), "scales found at run time")
    what = {"weights": "weights alone as codes", **at_run_time}.get(key, f"the form {key!r}")
    return f"the target {target.name} gains nothing from {op} with {what}, or does not run it"


def unable(node: gs.Node, weight: Weight, recipe: Recipe, target: Target) -> str:
    """Return why one weighted node cannot take its form, ``""`` when it can."""
    assert recipe.weights is not None
    if target.weight_formats and recipe.weights.format not in target.weight_formats:
        return f"the target {target.name} runs no {recipe.weights.format} weights"
    form = form_of(node.op, recipe, target)
    if form in ("qdq", "outlier"):
        return _unable_blocks(recipe, target) if form == "qdq" else ""
    if form == "dynamic" and recipe.weights.granularity == "block":
        return "MatMulInteger has one scale per column, none for blocks: leave out block, or the dynamic activations"
    if form == "dynamic" and not _is_byte(recipe.weights.format):
        return f"MatMulInteger takes weights of 8 bits, not {recipe.weights.format}"
    if form == "recurrent":
        return _unable_recurrent(node, recipe.weights)
    if len(weight.shape) != 2:
        return "its weight is a stack of matrices, and the operator that would replace it takes one"
    scaled = [float(node.attrs.get(name, 1.0)) != 1.0 for name in ("alpha", "beta")]
    if node.op == "Gemm" and (any(scaled) or node.attrs.get("transA", 0)):
        return "a Gemm that scales its operands or transposes its input has no such form"
    if node.op == "Gemm" and len(node.inputs) > 2 and not node.inputs[2].is_empty():
        bias = weight_of(node.inputs[2])
        if bias is None:
            return "its bias is computed at run time"
    inputs = math.prod(weight.shape) // weight.shape[layout_of(node, weight.shape).order[0]]
    size = FORMATS.get(recipe.weights.format).block_size or recipe.weights.block_size
    if form == "bnb4" and (size not in BNB4_BLOCKS or inputs % size):
        return f"MatMulBnb4 needs blocks of {BNB4_BLOCKS} that divide its {inputs} inputs, not of {size}"
    return ""


def _unable_recurrent(node: gs.Node, weights: WeightOptions) -> str:
    if weights.format != "int8" or weights.granularity == "block" or weights.symmetric is False:
        return "DynamicQuantizeLSTM takes symmetric int8 weights with a scale per channel or tensor"
    return "its sequences lie batch by batch (layout 1), which no kernel takes" if node.attrs.get("layout", 0) else ""


def _unable_blocks(recipe: Recipe, target: Target) -> str:
    """Return why weights in blocks cannot stand beside codes of activations, ``""`` when they can."""
    weights, activations = recipe.weights, recipe.activations
    if target.fuses_blocks or weights is None or activations is None or weights.granularity != "block":
        return ""
    if not (_is_byte(weights.format) and _is_byte(activations.format or target.activation_format)):
        return ""
    return (
        "ONNX Runtime fuses a product of 8-bit codes whatever its scales, and computes wrong values, or fails, with "
        "scales in blocks: take granularity channel, or leave activations in float"
    )


def _is_byte(name: str) -> bool:
    return FORMATS.get(name).is_integer and FORMATS.get(name).bits == 8


def wants_data(recipe: Recipe) -> bool:
    """Whether a recipe stores weights and activations as codes with static scales: what statistics make better."""
    static = recipe.activations is not None and not recipe.activations.dynamic and recipe.form in (None, "qdq")
    return static and recipe.weights is not None


def algorithm(recipe: Recipe, spec: Spec, known: TensorStats | None) -> str:
    """Return the algorithm of a weight that meets codes with static scales.

    Args:
        recipe: Of the node; what it names is taken.
        spec: How the weight is stored.
        known: Statistics of its input. With its Gram matrix GPTQ is taken: rounding errors of weights are the same for
            every token, so they add up where those of activations average out.
    """
    assert recipe.weights is not None
    fits = recipe.weights.method == "rtn" and recipe.weights.algorithm is None and spec.format.is_integer
    return "gptq" if fits and known is not None and known.gram is not None else recipe.weights.method


def table(node: gs.Node, recipe: Recipe) -> Spec | None:
    """Return how the table of a Gather is stored: int8 with a scale per row; None when it is none or stays in float."""
    if recipe.weights is None or not recipe.weights.embeddings or node.op != "Gather" or node.attrs.get("axis", 0):
        return None
    weight = weight_of(node.inputs[0])
    if weight is None or len(weight.shape) != 2 or dtype_name(weight.constant) != "float32":
        return None
    return Spec(format=FORMATS.get("int8"), granularity=per_channel(0), narrow_range=True)
