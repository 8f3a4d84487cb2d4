"""What decisions depend on: recipe, target, statistics; and what speaks against a node whatever its neighbours do."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from ...calibrate.formats import FORMATS
from ...calibrate.granularity import PER_TENSOR
from ...calibrate.qarray import Spec
from ...calibrate.stats.extrema import MAX_NONFINITE
from ...calibrate.stats.histogram import Histogram
from ..calibration import Calibration
from ..constants import QUANTIZABLE, Weight, dtype_name, is_sparse, weight_of
from ..graph import values
from ..patterns import matches
from ..recipe import Recipe, make_recipe
from ..rules import OpRule, rule_of
from ..targets import Target
from . import choice, outliers

PER_CHANNEL_OPSET = 13
"""First opset whose DequantizeLinear takes a scale per channel."""
NARROW_SCALE_OPSET = 19
"""First opset whose Q/DQ operators take scales in float16 and bfloat16."""


@dataclass(slots=True, kw_only=True)
class Context:
    """What decisions depend on.

    Attributes:
        recipe: What the user asks.
        target: What the runtime wants.
        calibration: Statistics, None when no activation gets a static scale.
        opset: Of the model.
        layers: Recipes of some nodes, by pattern; the first that matches wins.
        ends: Nodes that stay in float wherever they stand, with the reason: first and last layers on request.
        functions: Domain and name of model-local functions, whose calls are no operators.
        static: Recipe of layers that have too few inputs for what theirs names: the scheme w8a8.
    """

    recipe: Recipe
    target: Target
    calibration: Calibration | None
    opset: int
    layers: tuple[tuple[str, Recipe], ...] = ()
    ends: Mapping[str, str] = field(default_factory=dict)
    functions: Collection[tuple[str, str]] = ()
    static: Recipe = field(default_factory=make_recipe)
    _constants: dict[str, Histogram] = field(default_factory=dict)
    _adapted: dict[int, Recipe] = field(default_factory=dict)

    def recipe_for(self, node: gs.Node) -> Recipe:
        """Return the recipe of one node, as the target can run it."""
        recipe = self.static if self.is_left_to_static(node) else self._asked(node)
        if id(recipe) not in self._adapted:
            self._adapted[id(recipe)] = choice.adapt(recipe, self.target)
        return self._adapted[id(recipe)]

    def is_left_to_static(self, node: gs.Node) -> bool:
        """Whether a node of few inputs is left to the scheme w8a8, for its recipe's form would not gain there."""
        options, runs = self._asked(node), node.op in self.target.kernels
        return runs and options.form == "outlier" and outliers.gains_by_static(node, options.outliers, self.calibration)

    def form_for(self, node: gs.Node) -> str:
        """Return how the graph expresses the decisions of one node."""
        return choice.form_of(node.op, self.recipe_for(node), self.target)

    def why_float_data(self, node: gs.Node) -> str:
        """Return why activations of a node stay in float against its recipe, ``""`` when they need not."""
        return choice.refused_activations(self._asked(node), self.target)

    def is_static(self, node: gs.Node) -> bool:
        """Whether activations of a node get scales from calibration, so that codes can pass to its neighbours."""
        options = self.recipe_for(node).activations
        return self.form_for(node) == "qdq" and options is not None and not options.dynamic

    def has_byte_codes(self, node: gs.Node) -> bool:
        """Whether a node multiplies integers of 8 bits with static scales, as integer kernels do."""
        recipe = self.recipe_for(node)
        if not self.is_static(node) or recipe.activations is None or recipe.weights is None:
            return False
        formats = (recipe.weights.format, recipe.activations.format or self.target.activation_format)
        return all(FORMATS.get(name).is_integer and FORMATS.get(name).bits == 8 for name in formats)

    def activation_spec(self, node: gs.Node, tensor: gs.Tensor) -> Spec:
        """Return how an activation of a node is stored."""
        options = self.recipe_for(node).activations
        assert options is not None
        spec = options.spec(self.target.activation_format, self.target.activation_symmetric)
        return _with_scale_type(spec, dtype_name(tensor))

    def weight_spec(self, node: gs.Node, rule: OpRule, weight: Weight) -> Spec:
        """Return how the weight of a node is stored."""
        recipe, rank = self.recipe_for(node), len(weight.shape)
        assert recipe.weights is not None
        is_integer_product = self.has_byte_codes(node) or self.form_for(node) in ("dynamic", "recurrent")
        pair_limit = self.target.pair_limit if is_integer_product else 0
        block_axis = rule.in_axis(node, rank)
        size = FORMATS.get(recipe.weights.format).block_size or recipe.weights.block_size
        if block_axis is not None and rank > 2 and weight.shape[block_axis] % size:
            block_axis = None  # Blocks of a kernel position that are cut short would cost more than they gain.
        zero_points = self.target.asymmetric
        spec = recipe.weights.spec(rule.out_axis(node, rank), block_axis, pair_limit, has_zero_points=zero_points)
        if self.opset < PER_CHANNEL_OPSET and not spec.granularity.block_size:
            spec = dataclasses.replace(spec, granularity=PER_TENSOR)
        if recipe.weights.float_zero_points and self.form_for(node) == "nbits" and not spec.symmetric:
            spec = dataclasses.replace(spec, float_zero=spec.format.bits in self.target.float_zero_bits)
        return _with_scale_type(spec, dtype_name(weight.constant))

    def absorbs(self, node: gs.Node, follower: gs.Node) -> bool:
        """Whether the quantizer behind ``node`` can stand behind ``follower``, a Relu or Clip, instead.

        It then has to cut where the follower cuts, which a symmetric one does not; or the target runs product and
        Relu in one kernel. A follower goes along with what ``include`` names: it is no operator any more.
        """
        rule = rule_of(follower)
        if rule is None or rule.kind != "absorbed" or not self.is_static(follower):
            return False
        if self._unwanted(follower) or self._unable(follower, rule):
            return False
        return self.target.fuses_relu or not self.activation_spec(node, follower.outputs[0]).symmetric

    def unfit(self, tensor: gs.Tensor) -> str:
        """Return why no static scale can be chosen for a tensor, ``""`` when one can."""
        if isinstance(tensor, gs.Constant) or weight_of(tensor) is not None:
            counted = self._of_constant(tensor)
            bad = f"{counted.nonfinite} values of the constant {tensor.name!r} are not finite"
            return bad if counted.nonfinite else _unfit(tensor.name, counted)
        if self.calibration is None or tensor.name not in self.calibration.tensors:
            known = {} if self.calibration is None else self.calibration.not_covered
            why = known.get(tensor.name, "it was not collected; qpipe calibrate --tensors all does")
            return f"no statistics of {tensor.name!r}: {why}"
        return _unfit(tensor.name, self.calibration.tensors[tensor.name].histogram)

    def unseen(self, node: gs.Node) -> str:
        """Return why a node that calibration never reached stays in float, ``""`` when it was reached or none can say.

        What a body reads from outside has statistics whether the body ran or not; what it computes only if it ran.
        """
        known = self.calibration.tensors if self.calibration is not None else {}
        ran = any(t.name not in known or known[t.name].histogram.total for t in node.outputs if not t.is_empty())
        return "" if ran else "it did not run during calibration: no batch took this branch"

    def refusal(self, node: gs.Node, rule: OpRule) -> str:
        """Return why a node stays in float whatever its neighbours do, ``""`` when nothing speaks against it."""
        return self.unwanted(node) or self._unable(node, rule)

    def unwanted(self, node: gs.Node) -> str:
        """Return why the user wants a node left alone, ``""`` when not."""
        if self.recipe.include and not any(matches(pattern, node) for pattern in self.recipe.include):
            return "no --include pattern matches it"
        return self._unwanted(node)

    def _unwanted(self, node: gs.Node) -> str:
        for pattern in self.recipe.exclude:
            if matches(pattern, node):
                return f"excluded by the pattern {pattern!r}"
        if node.name in self.ends:
            return self.ends[node.name]
        if self.recipe_for(node).weights is None and self.recipe_for(node).activations is None:
            return "the recipe leaves this layer in float"
        return ""

    def _asked(self, node: gs.Node) -> Recipe:
        return next((recipe for pattern, recipe in self.layers if matches(pattern, node)), self.recipe)

    def _unable(self, node: gs.Node, rule: OpRule) -> str:
        without = choice.no_kernel(node.op, self.recipe_for(node), self.target) if rule.kind == "weighted" else ""
        if rule.kind != "weighted" and node.op not in self.target.kernels:
            without = f"the target {self.target.name} has no integer kernel for {node.op}"
        if without:
            return without
        inputs = [tensor for _, tensor in rule.data_inputs(node)]
        for tensor in inputs:
            if dtype_name(tensor) not in QUANTIZABLE:
                return f"its input {tensor.name!r} is {dtype_name(tensor) or 'of unknown type'}, not float"
            if is_sparse(tensor):
                return f"its weight {tensor.name!r} is stored sparse, and too large to be stored dense"
        why = rule.unless(node)
        return why or ("all its inputs are constants" if all(weight_of(t) is not None for t in inputs) else "")

    def _of_constant(self, tensor: gs.Tensor) -> Histogram:
        if tensor.name not in self._constants:
            weight = weight_of(tensor)
            assert weight is not None
            self._constants[tensor.name] = Histogram.of(values(weight.constant))
        return self._constants[tensor.name]


def _unfit(name: str, histogram: Histogram) -> str:
    if histogram.sentinel:
        return f"{name!r} holds {histogram.sentinel} mask sentinels (over 1e30), which no scale can hold"
    if histogram.extrema.neg_inf > MAX_NONFINITE * histogram.total:
        return f"{name!r} holds {histogram.extrema.neg_inf} values of -Inf (a mask), which no scale can hold"
    if histogram.finite == 0:
        return f"no statistics of {name!r}: it held no finite value during calibration"
    return ""


def _with_scale_type(spec: Spec, dtype: str) -> Spec:
    """Return ``spec`` with scales of a half-precision tensor's own type: DequantizeLinear gives the scale's type."""
    if dtype not in ("float16", "bfloat16") or spec.format.scale_format != "float32":
        return spec
    opset = max(spec.format.min_opset, NARROW_SCALE_OPSET, FORMATS.get(dtype).min_opset)
    return dataclasses.replace(spec, format=dataclasses.replace(spec.format, scale_format=dtype, min_opset=opset))
