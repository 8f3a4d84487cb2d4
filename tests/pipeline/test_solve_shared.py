"""Scales of activations: which statistics they come from, and who shares them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.qarray import Spec
from qpipe.calibrate.stats.histogram import Histogram
from qpipe.pipeline import graph
from qpipe.pipeline.calibration import Calibration, TensorStats
from qpipe.pipeline.plan import Decision, Plan, Site
from qpipe.pipeline.stages.prepare import prepare
from qpipe.pipeline.stages.solve import solve
from qpipe.pipeline.statistics import with_constants, with_moved
from quantizing import model, normal

BYTE = Spec(format=FORMATS.get("uint8"), symmetric=False)
WORD = Spec(format=FORMATS.get("uint16"), symmetric=False)


def plan(*tensors: str, spec: Spec = BYTE, groups: dict[str, str] | None = None) -> Plan:
    """A plan that stores tensors as activations."""
    sites = [Site(node=f"n{i}", slot="in0", tensor=name, role="activation") for i, name in enumerate(tensors)]
    decisions = tuple(Decision(site=site, op="MatMul", spec=spec, reason="test") for site in sites)
    return Plan(decisions=decisions, groups=groups or {}, target="portable", recipe_hash="", model_hash="")


def known(**values: list[float]) -> Calibration:
    return Calibration(
        tensors={name: TensorStats(histogram=Histogram.of(np.float32(array))) for name, array in values.items()}
    )


def test_a_range_is_that_of_the_statistics() -> None:
    done = solve(plan("a"), known(a=[-1.0, 3.0]), "minmax")
    found = done["a", BYTE]
    assert (found.range.lo, found.range.hi, found.method) == (-1.0, 3.0, "minmax")
    assert found.params.scale == np.float32(4 / 255)
    assert found.params.zero_point == 64


@pytest.mark.parametrize("method", ["auto", "mse", "entropy", "percentile:50"])
def test_the_ends_of_a_range_are_kept_whatever_the_method(method: str) -> None:
    """Nothing is known of an equalized tensor but its ends: no method has a reason to give one of them up."""
    found = solve(plan("a"), known(a=[-0.17, 3.6]), method)["a", BYTE]
    assert (found.range.lo, found.range.hi, found.method) == (np.float32(-0.17), np.float32(3.6), "minmax")


def test_a_group_shares_the_range_of_all_its_tensors() -> None:
    groups = {"a": "a", "b": "a"}
    done = solve(plan("a", "b", "c", groups=groups), known(a=[-1.0, 1.0], b=[0.0, 3.0], c=[2.0]), "minmax")
    assert done["a", BYTE] is done["b", BYTE]
    assert (done["a", BYTE].range.lo, done["a", BYTE].range.hi) == (-1.0, 3.0)
    assert done["c", BYTE].range.hi == 2.0


def test_tensors_of_a_group_that_no_decision_names_do_not_widen_it() -> None:
    done = solve(plan("a", groups={"a": "a", "b": "a"}), known(a=[1.0], b=[9.0]), "minmax")
    assert done["a", BYTE].range.hi == 1.0


def test_one_tensor_can_be_stored_in_two_ways() -> None:
    both = replace(plan("a"), decisions=plan("a").decisions + plan("a", spec=WORD).decisions)
    done = solve(both, known(a=[0.0, 1.0]), "minmax")
    assert done["a", BYTE].params.scale == np.float32(1 / 255)
    assert done["a", WORD].params.scale == np.float32(1 / 65535)


@pytest.mark.parametrize("method", ["minmax", "percentile:99.9", "mse", "entropy", "auto"])
def test_every_method_gives_a_range_inside_the_data(method: str) -> None:
    values = normal(2000).tolist()
    found = solve(plan("a"), known(a=values), method)["a", BYTE]
    assert min(values) * 1.01 <= found.range.lo <= 0 <= found.range.hi <= max(values) * 1.01


def test_nothing_is_solved_without_static_activations() -> None:
    assert solve(plan(), None, "auto") == {}
    assert solve(plan("a"), None, "auto") == {}


def test_statistics_move_with_values() -> None:
    text = """g (float[2,4] x) => (float[2,4] y) {
        a = Transpose(x)  b = Reshape(a, s)  c = Tanh(b)  y = Reshape(c, t)
    }"""
    graph_ = prepare(graph.from_proto(model(text, s=np.array([8]), t=np.array([2, 4])))).graph
    found = with_moved(graph_, known(x=[1.0, 2.0]))
    assert set(found.tensors) == {"x", "a", "b"}
    assert found.tensors["b"].histogram == known(x=[1.0, 2.0]).tensors["x"].histogram


def test_what_was_collected_is_not_replaced() -> None:
    graph_ = prepare(graph.from_proto(model("g (float[2,4] x) => (float[4,2] y) { y = Transpose(x) }"))).graph
    found = with_moved(graph_, known(x=[1.0], y=[5.0]))
    assert found.tensors["y"].histogram.hi == 5.0


def test_constants_are_counted_from_their_values_when_a_plan_stores_them() -> None:
    text = "g (float[2,4] x) => (float[2,4] y) { a = Mul(x, k)  y = Add(a, m) }"
    graph_ = prepare(graph.from_proto(model(text, k=np.float32([2, -1, 0, 4]), m=normal(4)))).graph
    site = Site(node="Mul_0", slot="in1", tensor="k", role="activation")
    stored = replace(plan(), decisions=(Decision(site=site, op="Mul", spec=BYTE, reason="test"),))
    found = with_constants(graph_, stored, known(x=[1.0]))
    assert set(found.tensors) == {"x", "k"}
    assert (found.tensors["k"].histogram.lo, found.tensors["k"].histogram.hi) == (-1.0, 4.0)
