"""Decide: graph, calibration, recipe and target become a `Plan`; nothing is changed here.

Every node gets decisions, and one that stays in float a reason. Operators that multiply by a weight are decided on
their own (`_weighted`); around them regions of codes grow (see `regions`). Each graph, the main one and
every body of If, Loop and Scan, is decided for itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import onnx
import onnx_graphsurgeon as gs

from ...calibrate.errors import DataError
from ...calibrate.formats import FORMATS
from ...calibrate.granularity import per_channel
from ...calibrate.qarray import Spec
from ..calibration import Calibration
from ..constants import QUANTIZABLE, Weight, dtype_name, weight_of
from ..graph import all_graphs
from ..patterns import require_matches
from ..plan import Decision, Plan, Site
from ..recipe import LayerOptions, Recipe, make_recipe
from ..rules import OpRule, rule_of
from ..targets import TARGETS
from . import choice, outliers
from .context import PER_CHANNEL_OPSET, Context
from .ends import end_layers
from .regions import Regions


@dataclass(slots=True)
class _Draft:
    """Decisions in the making, by node name.

    Attributes:
        decisions: What was decided so far.
        inside: Where the graph under work is, ``""`` for the main graph.
    """

    decisions: dict[str, list[Decision]] = field(default_factory=dict)
    inside: str = ""

    def put(self, node: gs.Node, slot: str, role: str, spec: Spec | None, reason: str, form: str = "qdq") -> None:
        tensor = _tensor_at(node, slot)
        site = Site(node=node.name, slot=slot, tensor=tensor.name if tensor is not None else "", role=role)
        entry = Decision(site=site, op=node.op, spec=spec, reason=reason, form=form)
        self.decisions.setdefault(node.name, []).append(entry)

    def keep(self, node: gs.Node, reason: str) -> None:
        self.put(node, "", "node", None, f"{self.inside}: {reason}" if self.inside else reason)

    def of(self, node: gs.Node) -> list[Decision]:
        """Return the decisions of one node: inputs in order, then outputs."""
        return sorted(self.decisions[node.name], key=lambda d: (d.site.role == "output", d.site.slot))

    def put_weight(self, node: gs.Node, slot: int, spec: Spec, reason: str, how: tuple[str, str]) -> None:
        """Decide a weight; ``how`` is its form and its algorithm."""
        self.put(node, f"in{slot}", "weight", spec, reason, how[0])
        entries = self.decisions[node.name]
        entries[-1] = replace(entries[-1], algorithm=how[1])


def decide(
    graph: gs.Graph,
    recipe: Recipe,
    calibration: Calibration | None,
    functions: Collection[onnx.FunctionProto] = (),
    kept: Mapping[str, str] | None = None,
) -> Plan:
    """Decide for every node and tensor how it is stored.

    Args:
        graph: Prepared float graph, topologically sorted, names unique.
        recipe: What the user asks.
        calibration: Statistics; None is enough when no activation gets a static scale.
        functions: Model-local functions, which are kept as they are.
        kept: Nodes that stay in float, by name, and why.

    Returns:
        The plan; `Plan.quantized` may be empty, the reasons are in the decisions.

    Raises:
        DataError: The recipe needs statistics and there are none.
        RecipeError: A pattern matches no node, or an unknown target or format.
    """
    context = _context(graph, recipe, calibration, functions)
    context = replace(context, ends={**context.ends, **(kept or {})})
    nodes = [node for inner in all_graphs(graph) for node in inner.nodes]
    require_matches([*recipe.include, *recipe.exclude, *(pattern for pattern, _ in context.layers)], nodes)
    if calibration is None and any(context.is_static(node) for node in nodes):
        raise DataError(
            "the recipe gives activations scales from statistics, and there are none",
            expected="data to calibrate with, or a statistics file",
            do="pass --data or --calib, or choose a scheme without static activations",
        )
    draft, groups = _Draft(), dict[str, str]()
    for inner, draft.inside in _scopes(graph):
        groups.update(_decide_graph(inner, context, draft))
    decisions = [d for node in nodes for d in draft.of(node)] + _inside_functions(functions)
    return Plan(
        decisions=tuple(decisions),
        groups=groups,
        target=context.target.name,
        recipe_hash=recipe.digest(),
    )


def wanted_tensors(graph: gs.Graph) -> list[str]:
    """Return the float tensors whose statistics some rule may ask for, in topological order, those in bodies too.

    These are the data inputs and the outputs of every operator that has a rule and is no ``float`` one.
    """
    wanted: dict[str, None] = {}
    for node in (node for inner in all_graphs(graph) for node in inner.nodes):
        rule = rule_of(node)
        if rule is None or rule.kind == "float":
            continue
        for tensor in [t for _, t in rule.data_inputs(node)] + list(node.outputs):
            if not tensor.is_empty() and dtype_name(tensor) in QUANTIZABLE and weight_of(tensor) is None:
                wanted[tensor.name] = None
    return list(wanted)


def _context(
    graph: gs.Graph, recipe: Recipe, calibration: Calibration | None, functions: Collection[onnx.FunctionProto]
) -> Context:
    def of_layer(entry: LayerOptions) -> Recipe:
        return entry.recipe(target=recipe.target, method=recipe.method)

    return Context(
        recipe=recipe,
        target=TARGETS.get(recipe.target),
        calibration=calibration,
        opset=int(graph.opset),
        layers=tuple((entry.match, of_layer(entry)) for entry in recipe.layers),
        ends=end_layers(graph, recipe.keep),
        functions={(function.domain, function.name) for function in functions},
        static=make_recipe(scheme="w8a8", target=recipe.target, method=recipe.method),
    )


def _scopes(graph: gs.Graph, inside: str = "") -> Iterator[tuple[gs.Graph, str]]:
    """Yield the main graph and all bodies, outer before inner, each with the words for where it is."""
    yield graph, inside
    for node in graph.nodes:
        for name, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                yield from _scopes(value, f"inside {node.op} {node.name!r}, {name}")


def _inside_functions(functions: Collection[onnx.FunctionProto]) -> list[Decision]:
    found = []
    for function in functions:
        for index, node in enumerate(function.node):
            path = f"{function.domain}::{function.name}/{node.name or f'{node.op_type}_{index}'}"
            site = Site(node=path, slot="", tensor="", role="node")
            reason = f"kept: inside the model-local function {function.name} (--inline takes its nodes out)"
            found.append(Decision(site=site, op=node.op_type, spec=None, reason=reason))
    return found


def _decide_graph(graph: gs.Graph, context: Context, draft: _Draft) -> dict[str, str]:
    """Decide the nodes of one graph, and return which of its tensors share a scale."""
    regions = Regions(graph, context)
    for node in graph.nodes:
        refusal = _decide_node(node, context, draft, regions)
        if refusal:
            draft.keep(node, refusal)
    for node, rule in regions.members():
        _decide_member(node, rule, context, draft, regions)
    return regions.groups()


def _decide_node(node: gs.Node, context: Context, draft: _Draft, regions: Regions) -> str:
    """Decide one node; return why it stays in float, ``""`` when it does not or when its neighbours settle that."""
    domain = node.domain or ""
    if (domain, node.op) in context.functions:
        return f"kept: call of the model-local function {node.op} (--inline puts its nodes here)"
    rule = rule_of(node)
    if rule is None:
        return f"no rule for {f'{domain}::' if domain else ''}{node.op}: it is left as it is"
    if rule.kind == "float":
        return rule.reason
    if regions.is_absorbed(node):
        return ""
    table = choice.table(node, context.recipe_for(node))
    if table is not None and not context.unwanted(node):
        draft.put_weight(node, 0, table, "rows of the table that are looked up become real", ("lookup", "rtn"))
        return ""
    refusal = context.refusal(node, rule)
    if refusal:
        return refusal
    if rule.kind == "weighted":
        return _weighted(node, rule, context, draft, regions)
    if not context.is_static(node):
        return "computes on codes only behind a static scale, which this recipe does not give"
    return regions.join(node, rule)


def _weighted(node: gs.Node, rule: OpRule, context: Context, draft: _Draft, regions: Regions) -> str:
    """Decide an operator with a weight; return why it stays in float, ``""`` when it is quantized."""
    recipe = context.recipe_for(node)
    assert rule.weight is not None
    weight = weight_of(node.inputs[rule.weight])
    if weight is None or recipe.weights is None:
        return _without_weight(node, rule, context, regions)
    why = choice.unable(node, weight, recipe, context.target)
    further = {slot: weight_of(node.inputs[slot]) for slot in rule.further_weights}
    why = why or next((f"its weight {node.inputs[s].name!r} is no constant" for s, w in further.items() if not w), "")
    if why:
        return why
    if context.form_for(node) == "outlier":
        return _outlier(node, rule.weight, weight, context, draft)
    spec = context.weight_spec(node, rule, weight)
    if context.is_static(node):
        why = _seed(node, rule, context, regions)
        if why:
            return why
    elif recipe.activations is not None:
        spec_of_data = context.activation_spec(node, node.inputs[0])
        draft.put(node, "in0", "activation", spec_of_data, "scaled at run time", context.form_for(node))
    elif context.why_float_data(node):
        draft.put(node, "in0", "activation", None, context.why_float_data(node))
    reason = "weight of a quantized operator"
    if context.is_left_to_static(node):
        reason = "too few inputs for OutlierMatMul and no outliers among them: static scales, as w8a8 gives"
    if context.opset < PER_CHANNEL_OPSET and recipe.weights.granularity == "channel":
        reason += f"; one scale per tensor, for opset {context.opset} has none per channel (qpipe quantize --upgrade)"
    known = None if context.calibration is None else context.calibration.tensors.get(node.inputs[0].name)
    # A weight of several layers is stored once, so its codes cannot follow the inputs of one of them.
    by_data = context.is_static(node) and known is not None and len(weight.constant.outputs) == 1
    can_look = not draft.inside or (known is not None and known.gram is not None)
    algorithm = choice.algorithm_of(node.op, recipe.weights, can_look=can_look)
    algorithm = choice.algorithm(recipe, spec, known) if by_data else algorithm
    how = (context.form_for(node), algorithm)
    draft.put_weight(node, rule.weight, spec, reason, how)
    for slot, other in further.items():
        assert other is not None
        draft.put_weight(node, slot, context.weight_spec(node, rule, other), reason, how)
    if rule.bias is not None and rule.bias < len(node.inputs) and weight_of(node.inputs[rule.bias]) is not None:
        _bias(node, rule.bias, context, draft)
    return ""


def _outlier(node: gs.Node, slot: int, weight: Weight, context: Context, draft: _Draft) -> str:
    """Decide a layer whose outlier columns stay in floating point; return why it stays in float as a whole."""
    options = context.recipe_for(node).outliers
    why = outliers.unable(node, weight, options, context.calibration)
    if why:
        return why
    chosen = outliers.choose(node.inputs[0].name, context.calibration, options)
    if isinstance(chosen, str):
        return chosen
    spec = Spec(format=FORMATS.get("int8"), granularity=per_channel(0), narrow_range=True)
    draft.put(node, f"in{slot}", "weight", spec, outliers.describe(chosen), "outlier")
    entries = draft.decisions[node.name]
    columns = tuple(int(c) for c in chosen.index)
    entries[-1] = replace(entries[-1], columns=columns, limit=chosen.limit * options.headroom)
    return ""


def _without_weight(node: gs.Node, rule: OpRule, context: Context, regions: Regions) -> str:
    recipe = context.recipe_for(node)
    constants = [t for _, t in rule.data_inputs(node) if weight_of(t) is not None]
    if recipe.weights is None and constants:
        return "the recipe leaves weights in float"
    if not constants and node.op not in ("MatMul", "Gemm"):
        return "its weight is computed at run time"
    if not constants and not context.target.static_attention:
        return "both inputs are activations (attention): float keeps its accuracy"
    if not context.is_static(node):
        return "its weight is not where codes of it could be stored: it is the left operand, or computed at run time"
    return _seed(node, rule, context, regions)


def _seed(node: gs.Node, rule: OpRule, context: Context, regions: Regions) -> str:
    """Start a region at a node, unless a tensor of it is unfit for a static scale; then return why."""
    gives_codes = node.op in context.target.needs_output
    needed = [t for slot, t in rule.data_inputs(node) if slot != rule.weight or weight_of(t) is None]
    if gives_codes:
        needed.append(regions.quantizer_place(node))
    unfit = next((why for tensor in needed if (why := context.unfit(tensor))), "") or context.unseen(node)
    if not unfit:
        regions.seed(node, rule, gives_codes=gives_codes)
    return unfit


def _bias(node: gs.Node, slot: int, context: Context, draft: _Draft) -> None:
    scaled = any(float(node.attrs.get(name, 1.0)) != 1.0 for name in ("alpha", "beta"))
    integer = node.op in context.target.int32_bias and context.has_byte_codes(node) and not scaled
    if integer and dtype_name(node.inputs[slot]) == "float32":
        reason = "int32 with scale s_x * s_w, as the integer kernel takes it"
        draft.put(node, f"in{slot}", "bias", None, reason, "int32")
    else:
        draft.put(node, f"in{slot}", "bias", None, "a float bias costs nothing here")


def _decide_member(node: gs.Node, rule: OpRule, context: Context, draft: _Draft, regions: Regions) -> None:
    """Write the decisions of one node of a region: the inputs that it reads as codes, and its output."""
    form = context.form_for(node)
    decided = {d.site.slot for d in draft.decisions.get(node.name, []) if d.site.role == "weight"}
    for slot, tensor in rule.data_inputs(node):
        if f"in{slot}" not in decided:
            spec = context.activation_spec(node, tensor)
            reason = "constant beside codes" if weight_of(tensor) is not None else "input of an integer kernel"
            draft.put(node, f"in{slot}", "activation", spec, reason, form)
    for tensor in regions.code_outputs(node):
        producer = tensor.inputs[0]
        slot = next(i for i, output in enumerate(producer.outputs) if output is tensor)
        reason = "its integer kernel gives codes" if producer is node else f"absorbed by the quantizer of {node.name}"
        draft.put(producer, f"out{slot}", "output", context.activation_spec(node, tensor), reason, form)


def _tensor_at(node: gs.Node, slot: str) -> gs.Tensor | None:
    if not slot:
        return None
    return node.inputs[int(slot[2:])] if slot.startswith("in") else node.outputs[int(slot[3:])]
