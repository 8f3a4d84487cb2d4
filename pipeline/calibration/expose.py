"""Make tensors of a model fetchable: as graph outputs, from bodies of If, Loop and Scan too.

A tensor inside a body is cast to float32, flattened and carried outwards, body by body: an If hands out nothing from
the branch that did not run, a Loop appends to a carried tensor (iterations may differ in shape), a Scan stacks.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

_PREFIX = "qpipe_watch_"


@dataclass(slots=True, kw_only=True)
class Exposed:
    """Where the values of tensors can be had.

    Attributes:
        order: All tensors that can be had, in topological order.
        outputs: Tensor -> name of the graph output that carries it.
        inputs: Tensors that are graph inputs.
        lifted: Tensors that come out of a body: float32, flat.
        not_covered: Tensors that cannot be had, and why.
    """

    order: list[str] = field(default_factory=list)
    outputs: dict[str, str] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    lifted: set[str] = field(default_factory=set)
    not_covered: dict[str, str] = field(default_factory=dict)


def expose(proto: ModelProto, tensors: Sequence[str], inside: Collection[str] = ()) -> Exposed:
    """Add graph outputs to ``proto``, in place, for those of ``tensors`` that are none yet.

    Args:
        proto: The model.
        tensors: Names of tensors.
        inside: Those that are counted inside the graph and need not be had outside.
    """
    graph = proto.graph
    found = Exposed()
    initializers = {tensor.name for tensor in graph.initializer}
    inputs = [entry.name for entry in graph.input if entry.name not in initializers]
    place = {name: index for index, name in enumerate([*inputs, *_topological(graph)])}
    produced = {name for node in graph.node for name in node.output}
    definitions = Counter(name for name in _topological(graph) if name)
    functions = {name: f.name for f in proto.functions for node in f.node for name in node.output}
    lifter, homes = _Lifter({*definitions, *initializers, *inputs}), _homes(graph)
    present = {entry.name for entry in graph.output}
    for name in sorted(dict.fromkeys(tensors), key=lambda name: place.get(name, len(place))):
        found.order.append(name)
        if name in inside:
            continue
        if name in inputs:
            found.inputs.append(name)
        elif name in produced:
            found.outputs[name] = name
        elif name in initializers:
            found.not_covered[name] = "it is a constant"
        elif definitions[name] > 1:
            found.not_covered[name] = "several bodies of If, Loop or Scan have a tensor of that name"
        elif name in definitions and (carried := lifter.lift(graph, homes, name)):
            found.outputs[name] = carried
            found.lifted.add(name)
        elif name in functions:
            found.not_covered[name] = f"it is inside the model-local function {functions[name]}"
        else:
            found.not_covered[name] = "the model has no such tensor" if name not in definitions else lifter.refusal
    found.order = [name for name in found.order if name not in found.not_covered]
    # Without a type ONNX Runtime fills in what it infers.
    graph.output.extend(ValueInfoProto(name=name) for name in found.outputs.values() if name not in present)
    return found


def _topological(graph: GraphProto) -> Iterator[str]:
    """Yield the names that nodes define, in the order of the nodes, those of bodies before their node's own."""
    for node in graph.node:
        for body in _bodies(node):
            yield from _topological(body)
        yield from node.output


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g


@dataclass(slots=True)
class _Home:
    """Where a tensor that a body defines is: a node of a graph, one of its bodies, and what that body has inside."""

    node: NodeProto
    body: GraphProto
    inside: dict[str, _Home]


def _homes(graph: GraphProto) -> dict[str, _Home]:
    """Return the home of every tensor that the bodies below a graph define; all graphs are walked once."""
    found: dict[str, _Home] = {}
    for node in graph.node:
        for body in _bodies(node):
            inside = _homes(body)
            home = _Home(node, body, inside)
            names = [name for inner in body.node for name in inner.output]
            found.update(dict.fromkeys([*inside, *names], home))
    return found


class _Lifter:
    def __init__(self, taken: set[str]) -> None:
        self._taken = taken
        self._serial = itertools.count()
        self.refusal = ""

    def lift(self, graph: GraphProto, homes: dict[str, _Home], name: str) -> str | None:
        """Return the name in ``graph`` of a tensor that carries ``name`` from a body below; None where none can."""
        home = homes[name]
        node, body = home.node, home.body
        if node.op_type not in _CARRIERS or node.domain not in ("", "ai.onnx"):
            self.refusal = f"it is inside a body of {node.op_type} {node.name!r}"
            return None
        is_direct = name not in home.inside
        inner_name = self._flatten(body, name) if is_direct else self.lift(body, home.inside, name)
        return inner_name and _CARRIERS[node.op_type](self, graph, node, body, inner_name)

    def fresh(self, kind: str) -> str:
        """Return an unused name."""
        name = next(n for i in self._serial if (n := f"{_PREFIX}{kind}_{i}") not in self._taken)
        self._taken.add(name)
        return name

    def _flatten(self, body: GraphProto, name: str) -> str:
        cast, shape, flat = self.fresh("cast"), self.fresh("shape"), self.fresh("flat")
        body.node.extend(
            [
                helper.make_node("Cast", [name], [cast], to=TensorProto.FLOAT),
                _constant(shape, TensorProto.INT64, [1], [-1]),
                helper.make_node("Reshape", [cast, shape], [flat]),
            ]
        )
        return flat

    def through_if(self, _graph: GraphProto, node: NodeProto, body: GraphProto, name: str) -> str:
        """Hand ``name`` out of the branch ``body``, and nothing out of the other one."""
        for branch in _bodies(node):
            out = name
            if branch is not body:
                out = self.fresh("empty")
                branch.node.append(_constant(out, TensorProto.FLOAT, [0], []))
            branch.output.append(_flat_info(out))
        node.output.append(self.fresh("if"))
        return node.output[-1]

    def through_loop(self, graph: GraphProto, node: NodeProto, body: GraphProto, name: str) -> str:
        """Append ``name`` of each iteration to a tensor that the Loop carries."""
        start, before, after, out = (self.fresh(kind) for kind in ("start", "before", "after", "loop"))
        carried = len(node.input) - 2
        body.input.append(_flat_info(before))
        body.node.append(helper.make_node("Concat", [before, name], [after], axis=0))
        body.output.insert(1 + carried, _flat_info(after))
        node.input.append(start)
        node.output.extend("" for _ in range(carried - len(node.output)))
        node.output.insert(carried, out)
        graph.node.insert(0, _constant(start, TensorProto.FLOAT, [0], []))
        return out

    def through_scan(self, _graph: GraphProto, node: NodeProto, body: GraphProto, name: str) -> str:
        """Stack ``name`` of all iterations."""
        body.output.append(_flat_info(name))
        node.output.append(self.fresh("scan"))
        for attribute in node.attribute:
            if attribute.name in ("scan_output_axes", "scan_output_directions"):
                attribute.ints.append(0)
        return node.output[-1]


_CARRIERS = {"If": _Lifter.through_if, "Loop": _Lifter.through_loop, "Scan": _Lifter.through_scan}


def _constant(name: str, kind: int, dims: list[int], values: list[int]) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, kind, dims, values))


def _flat_info(name: str) -> ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, [None])
