"""A graph of twice as many nodes takes twice as many steps, counted and not timed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from qpipe.calibrate.stats.histogram import Histogram
from qpipe.pipeline import graph
from qpipe.pipeline.calibration import Calibration, TensorStats
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.stages.collect import CollectOptions, collect
from qpipe.pipeline.stages.decide import wanted_tensors
from qpipe.pipeline.stages.prepare import prepare
from qpipe.pipeline.stages.quantize import quantize_model
from qpipe.plugins.range_stats import device, op
from quantizing import normal

SHAPE = [1, 4, 2, 2]


def built(nodes: list[onnx.NodeProto], last: str, **weights: Any) -> onnx.ModelProto:
    inner = helper.make_graph(
        nodes,
        "g",
        [value("x")],
        [value(last)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(inner, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def chain(count: int) -> onnx.ModelProto:
    """Products with normalizations, sums and moves, one behind the other."""
    nodes, last = [], "x"
    for i in range(count // 5):
        nodes += [
            helper.make_node("Conv", [last, "w"], [f"c{i}"]),
            helper.make_node("BatchNormalization", [f"c{i}", "s", "s", "s", "s"], [f"n{i}"]),
            helper.make_node("Relu", [f"n{i}"], [f"r{i}"]),
            helper.make_node("Add", [f"r{i}", f"r{i}"], [f"a{i}"]),
            helper.make_node("MaxPool", [f"a{i}"], [f"m{i}"], kernel_shape=[1, 1]),
        ]
        last = f"m{i}"
    return built(nodes, last, w=normal(4, 4, 1, 1), s=np.abs(normal(4)) + 0.1)


def fan(count: int) -> onnx.ModelProto:
    """One tensor that all products read, and one operator that reads all of their results."""
    nodes = [helper.make_node("Conv", ["x", "w"], ["h"])]
    nodes += [helper.make_node("Conv", ["h", "w"], [f"c{i}"]) for i in range(count)]
    nodes += [helper.make_node("Sum", [f"c{i}" for i in range(count)], ["y"])]
    return built(nodes, "y", w=normal(4, 4, 1, 1))


def moves(count: int) -> onnx.ModelProto:
    """Codes that are moved many times: one group of tensors with one scale."""
    nodes, last = [helper.make_node("Conv", ["x", "w"], ["h"])], "h"
    for i in range(count):
        nodes.append(helper.make_node("Transpose", [last], [f"t{i}"], perm=[0, 1, 3, 2]))
        last = f"t{i}"
    return built([*nodes, helper.make_node("Conv", [last, "w"], ["y"])], "y", w=normal(4, 4, 1, 1))


def inside_a_branch(count: int) -> onnx.ModelProto:
    """The chain as one branch of an If."""
    inner = chain(count).graph
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["same"])], "else", [], [value("same")])
    then = helper.make_graph(list(inner.node), "then", [], [inner.output[0]])
    node = helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other)
    flag = helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [])
    outer = helper.make_graph([node], "g", [inner.input[0], flag], [value("y")], list(inner.initializer))
    return helper.make_model(outer, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, SHAPE)


def steps(work: Callable[[], Any]) -> int:
    """Number of lines of Python that run, every turn of a loop counted, and of calls of built-in functions."""
    count = 0

    def line(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += 1
        return line

    def call(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "c_call"

    sys.settrace(line)
    sys.setprofile(call)
    try:
        work()
    finally:
        sys.setprofile(None)
        sys.settrace(None)
    return count


def quantized(source: onnx.ModelProto) -> int:
    names = wanted_tensors(prepare(graph.from_proto(source)).graph)
    statistics = Calibration(tensors=dict.fromkeys(names, TensorStats(histogram=Histogram.of(normal(100)))))
    recipe = make_recipe(method="minmax", weights={"reduce_bits": 1})
    return steps(lambda: quantize_model(prepare(graph.from_proto(source)), recipe, statistics))


@pytest.mark.parametrize("build", [chain, fan, moves, inside_a_branch])
def test_twice_the_nodes_take_twice_the_steps(build: Callable[[int], onnx.ModelProto]) -> None:
    quantized(build(20))  # what is done once is done now
    small, large = quantized(build(150)), quantized(build(300))
    assert large < 2.2 * small


def collected(source: onnx.ModelProto, *, native: bool) -> int:
    names = wanted_tensors(prepare(graph.from_proto(source)).graph)
    batch = {"x": np.zeros(SHAPE, np.float32), "flag": np.array(True)}
    batch = {entry.name: batch[entry.name] for entry in source.graph.input}
    return steps(lambda: collect(source, names, [batch], CollectOptions(native=native, threads=1)))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("build", [chain, fan, moves, inside_a_branch])
def test_twice_the_nodes_take_twice_the_steps_to_calibrate(
    build: Callable[[int], onnx.ModelProto], native: bool
) -> None:
    collected(build(20), native=native)
    small, large = collected(build(150), native=native), collected(build(300), native=native)
    assert large < 2.2 * small


def test_twice_the_nodes_without_names_take_twice_the_steps_to_load() -> None:
    few, many = (built([helper.make_node("Neg", ["x"], [f"y{i}"]) for i in range(n)], "y0") for n in (1000, 2000))
    assert steps(lambda: graph.from_proto(many)) < 2.2 * steps(lambda: graph.from_proto(few))


@pytest.mark.parametrize("attach", [op.attach, device.attach])
def test_a_counting_node_stands_behind_the_node_that_it_counts(attach: Callable[..., Any]) -> None:
    """Nodes at the end would take ONNX Runtime quadratic time to sort, before each of its passes."""
    source = chain(20)
    before = [node.output[0] for node in source.graph.node]
    attach(source, ["m3", "x", "c0"])
    after = [(node.op_type, node.input[0], node.output[0]) for node in source.graph.node]
    assert [made for kind, _, made in after if not kind.startswith("RangeStats")] == before
    assert after[0][:2] == (after[2][0], "x")
    assert after[2][1] == after[1][2] == "c0"
    assert after[-1][1] == after[-2][2] == "m3"
