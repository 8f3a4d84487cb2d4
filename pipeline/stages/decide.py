"""Decide: graph, calibration, recipe and target become a `Plan`; nothing is changed here.

Three steps. *Seeds*: operators with a weight (Conv, Gemm, MatMul ...) that the recipe and the target admit.
*Growth*: where a seed's integer kernel needs a quantizer behind it, its output is codes, and operators that compute on
codes or move them join in while all their inputs are codes. *Pruning*: operators that only move codes leave again when
nothing behind them reads codes. Every considered site gets a decision, and one that stays in float a reason.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from ...calibrate.qarray import Spec
from ..calibration import Calibration
from ..constants import FLOATS, dtype_name, weight_of
from ..patterns import matches, require_matches
from ..plan import Decision, Plan, Site
from ..recipe import Recipe, make_recipe
from ..rules import RULES, OpRule
from ..targets import TARGETS, Target
from .regions import Regions

DEFAULT_ALGORITHM = "rtn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a decision depends on."""

    recipe: Recipe
    target: Target
    calibration: Calibration | None
    layers: tuple[tuple[str, Recipe], ...] = ()

    def recipe_for(self, node: gs.Node) -> Recipe:
        """Return the recipe of one node: that of the first layer entry that matches it."""
        for pattern, recipe in self.layers:
            if matches(pattern, node):
                return recipe
        return self.recipe


@dataclass(slots=True)
class _Draft:
    """Decisions in the making, by node name."""

    decisions: dict[str, list[Decision]] = field(default_factory=dict)

    def put(self, node: gs.Node, slot: str, role: str, spec: Spec | None, reason: str, form: str = "qdq") -> None:
        tensor = _tensor_at(node, slot)
        site = Site(node=node.name, slot=slot, tensor=tensor.name if tensor is not None else "", role=role)
        entry = Decision(site=site, op=node.op, spec=spec, reason=reason, form=form)
        self.decisions.setdefault(node.name, []).append(entry)

    def put_weight(self, node: gs.Node, slot: str, spec: Spec, recipe: Recipe) -> None:
        self.put(node, slot, "weight", spec, "weight of a quantized operator", recipe.form)
        assert recipe.weights is not None
        entries = self.decisions[node.name]
        entries[-1] = dataclasses.replace(entries[-1], algorithm=recipe.weights.algorithm or DEFAULT_ALGORITHM)


def decide(graph: gs.Graph, recipe: Recipe, calibration: Calibration | None, model_hash: str = "") -> Plan:
    """Decide for every node and tensor how it is stored.

    Args:
        graph: Prepared float graph, topologically sorted, names unique.
        recipe: What the user asks.
        calibration: Statistics; None is enough when no activation gets a static scale.
        model_hash: Of the float model, recorded in the plan.

    Returns:
        The plan; `Plan.quantized` may be empty, the reasons are in the decisions.

    Raises:
        RecipeError: A pattern matches no node, or an unknown target or format.
    """
    layers = tuple((entry.match, _layer_recipe(recipe, entry.scheme)) for entry in recipe.layers)
    target = TARGETS.get(recipe.target)
    require_matches([*recipe.include, *recipe.exclude, *(pattern for pattern, _ in layers)], graph.nodes)
    context = Context(recipe=recipe, target=target, calibration=calibration, layers=layers)
    draft, regions = _Draft(), Regions(graph=graph, target=target)
    for node in graph.nodes:
        _decide_node(node, context, draft, regions)
    regions.prune()
    for node, rule in regions.members():
        _decide_member(node, rule, context, draft, regions)
    ordered = [d for node in graph.nodes for d in draft.decisions.get(node.name, [])]
    return Plan(
        decisions=tuple(ordered),
        groups=regions.groups(),
        target=target.name,
        recipe_hash=recipe.digest(),
        model_hash=model_hash,
    )


def wanted_tensors(graph: gs.Graph) -> list[str]:
    """Return the float tensors whose statistics some rule may ask for, in topological order.

    These are the data inputs and the outputs of every operator that has a rule and is no ``float`` one.
    """
    wanted: dict[str, None] = {}
    for node in graph.nodes:
        if node.op not in RULES or RULES.get(node.op).kind == "float":
            continue
        rule = RULES.get(node.op)
        for tensor in [t for _, t in rule.data_inputs(node)] + list(node.outputs):
            if not isinstance(tensor, gs.Constant) and not tensor.is_empty() and dtype_name(tensor) in FLOATS:
                wanted[tensor.name] = None
    return list(wanted)


def _layer_recipe(recipe: Recipe, scheme: str) -> Recipe:
    return make_recipe(scheme=scheme, target=recipe.target, method=recipe.method)


def _decide_node(node: gs.Node, context: Context, draft: _Draft, regions: Regions) -> None:
    if node.op not in RULES:
        draft.put(node, "", "node", None, f"no rule for {node.op}: it is left as it is")
        return
    rule = RULES.get(node.op)
    refusal = rule.reason if rule.kind == "float" else _refusal(node, rule, context)
    if refusal:
        draft.put(node, "", "node", None, refusal)
    elif rule.kind == "weighted":
        _decide_weighted(node, rule, context, draft, regions)
    elif not regions.grow(node, rule):
        draft.put(node, "", "node", None, regions.why_not(node, rule))


def _refusal(node: gs.Node, rule: OpRule, context: Context) -> str:
    """Return why a node stays in float whatever its neighbours do, ``""`` when nothing speaks against it."""
    recipe = context.recipe
    for pattern in recipe.exclude:
        if matches(pattern, node):
            return f"excluded by the pattern {pattern!r}"
    if recipe.include and not any(matches(pattern, node) for pattern in recipe.include):
        return "no --include pattern matches it"
    if context.recipe_for(node).weights is None and context.recipe_for(node).activations is None:
        return "the recipe leaves this layer in float"
    if node.op not in context.target.kernels:
        return f"the target {context.target.name} has no integer kernel for {node.op}"
    for _, tensor in rule.data_inputs(node):
        if dtype_name(tensor) not in FLOATS:
            return f"its input {tensor.name!r} is {dtype_name(tensor) or 'of unknown type'}, not float"
        if not isinstance(tensor, gs.Constant) and context.calibration is not None:
            refusal = _bad_statistics(tensor.name, context.calibration)
            if refusal:
                return refusal
    return ""


def _bad_statistics(tensor: str, calibration: Calibration) -> str:
    if tensor not in calibration.tensors:
        return f"no statistics: {tensor!r} was not seen during calibration"
    histogram = calibration.tensors[tensor].histogram
    if histogram.extrema.sentinel:
        return f"{tensor!r} holds {histogram.extrema.sentinel} mask sentinels (over 1e30), which no scale can hold"
    if histogram.finite == 0:
        return f"no statistics: {tensor!r} held no finite value during calibration"
    return ""


def _decide_weighted(node: gs.Node, rule: OpRule, context: Context, draft: _Draft, regions: Regions) -> None:
    recipe, target = context.recipe_for(node), context.target
    slot = rule.weight
    weight = weight_of(node.inputs[slot]) if slot is not None and slot < len(node.inputs) else None
    if weight is None:
        if not target.static_attention:
            draft.put(node, "", "node", None, "both inputs are activations (attention): float keeps its accuracy")
            return
        _decide_activations_only(node, recipe, target, draft, regions)
        return
    if recipe.weights is None:
        draft.put(node, "", "node", None, "the recipe leaves weights in float")
        return
    rank = len(weight.shape)
    pair_limit = target.pair_limit if recipe.activations is not None else 0
    spec = recipe.weights.spec(rule.out_axis(node, rank), rule.in_axis(node, rank), pair_limit)
    needs_output = node.op in target.needs_output
    if recipe.activations is not None and needs_output and not regions.can_carry_output(node, context.calibration):
        draft.put(node, "", "node", None, "its output has no statistics, and its integer kernel needs them")
        return
    if recipe.activations is not None:
        _put_activation(node, 0, recipe, target, draft)
        regions.seed(node, rule)
    draft.put_weight(node, f"in{slot}", spec, recipe)
    if rule.bias is not None and rule.bias < len(node.inputs) and weight_of(node.inputs[rule.bias]) is not None:
        _put_bias(node, rule.bias, recipe, target, draft)


def _put_bias(node: gs.Node, slot: int, recipe: Recipe, target: Target, draft: _Draft) -> None:
    if node.op not in target.int32_bias or recipe.activations is None or recipe.form != "qdq":
        draft.put(node, f"in{slot}", "bias", None, "a float bias costs nothing here")
        return
    draft.put(node, f"in{slot}", "bias", None, "int32 with scale s_x * s_w, as the integer kernel takes it", "int32")


def _decide_activations_only(node: gs.Node, recipe: Recipe, target: Target, draft: _Draft, regions: Regions) -> None:
    if recipe.activations is None:
        draft.put(node, "", "node", None, "the recipe leaves activations in float")
        return
    for slot in (0, 1):
        _put_activation(node, slot, recipe, target, draft)
    regions.seed(node, RULES.get(node.op))


def _put_activation(node: gs.Node, slot: int, recipe: Recipe, target: Target, draft: _Draft) -> None:
    assert recipe.activations is not None
    spec = recipe.activations.spec(target.activation_format, target.activation_symmetric)
    draft.put(node, f"in{slot}", "activation", spec, "input of an integer kernel", recipe.form)


def _decide_member(node: gs.Node, rule: OpRule, context: Context, draft: _Draft, regions: Regions) -> None:
    """Write the decisions of one node of a region: its inputs (unless it is a seed) and its output."""
    recipe, target = context.recipe_for(node), context.target
    assert recipe.activations is not None
    if rule.kind != "weighted":
        for slot, _ in rule.data_inputs(node):
            _put_activation(node, slot, recipe, target, draft)
    spec = recipe.activations.spec(target.activation_format, target.activation_symmetric)
    for tensor in regions.code_outputs(node):
        producer = tensor.inputs[0]
        slot = next(i for i, output in enumerate(producer.outputs) if output is tensor)
        reason = "its integer kernel gives codes" if producer is node else f"absorbed by the quantizer of {node.name}"
        draft.put(producer, f"out{slot}", "output", spec, reason, recipe.form)


def _tensor_at(node: gs.Node, slot: str) -> gs.Tensor | None:
    if not slot:
        return None
    return node.inputs[int(slot[2:])] if slot.startswith("in") else node.outputs[int(slot[3:])]
