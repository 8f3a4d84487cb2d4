"""Operator rules: the data that decides who takes part."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from qpipe.pipeline.rules import RULES, rule_of

REGISTRIES = ("QDQRegistry", "QLinearOpsRegistry", "IntegerOpsRegistry")
"""ONNX Runtime's own quantizers by operator type: static Q/DQ, static QOperator, dynamic."""
MICROSOFTS = {"Attention", "EmbedLayerNormalization"}
"""Those of its own domain."""


def registered() -> dict[str, set[str]]:
    registry = pytest.importorskip("onnxruntime.quantization.registry")
    return {name: set(getattr(registry, name)) for name in REGISTRIES}


@pytest.mark.parametrize("name", REGISTRIES)
def test_every_operator_that_onnxruntime_quantizes_has_a_rule(name: str) -> None:
    ops = registered()[name]
    missing = {op for op in ops if (f"com.microsoft::{op}" if op in MICROSOFTS else op) not in RULES}
    assert len(ops) > 5
    assert missing == set()


@pytest.mark.parametrize("name", REGISTRIES)
def test_every_operator_that_onnxruntime_quantizes_has_a_model_of_its_own(name: str) -> None:
    models = (Path(__file__).parents[1] / "conformance" / "test_operators.py").read_text()
    assert {op for op in registered()[name] if not re.search(rf"\b{op}\b\s*[(<]", models)} == set()


def node(op: str, shapes: tuple[tuple[int, ...], ...] = ((2, 3),), domain: str = "", **attrs: object) -> gs.Node:
    inputs = [gs.Variable(f"i{i}", np.float32, shape) for i, shape in enumerate(shapes)]
    return gs.Node(op, op, attrs=dict(attrs), inputs=inputs, outputs=[gs.Variable("y", np.float32)], domain=domain)


@pytest.mark.parametrize(
    ("op", "attrs", "rank", "out", "into"),
    [
        ("Conv", {}, 4, 0, 1),
        ("Conv", {}, 3, 0, 1),
        ("ConvTranspose", {"group": 2}, 4, 1, 0),
        ("MatMul", {}, 2, 1, 0),
        ("MatMul", {}, 3, None, None),
        ("MatMul", {}, 1, None, None),
        ("Gemm", {}, 2, 1, 0),
        ("Gemm", {"transB": 1}, 2, 0, 1),
    ],
)
def test_axes_of_weights(op: str, attrs: dict[str, int], rank: int, out: int | None, into: int | None) -> None:
    rule = RULES.get(op)
    assert (rule.out_axis(node(op, **attrs), rank), rule.in_axis(node(op, **attrs), rank)) == (out, into)


def test_an_operator_of_another_domain_is_another_operator() -> None:
    assert rule_of(node("Conv")) is RULES.get("Conv")
    assert rule_of(node("Conv", domain="ai.onnx")) is RULES.get("Conv")
    assert rule_of(node("Conv", domain="my.own")) is None
    assert rule_of(node("Attention", domain="com.microsoft")) is RULES.get("com.microsoft::Attention")


def test_absent_optional_inputs_are_no_data() -> None:
    where = node("Where", ((2,), (2,), (2,)))
    where.inputs[2] = gs.Variable.empty()
    assert [slot for slot, _ in RULES.get("Where").data_inputs(where)] == [1]
    assert [slot for slot, _ in RULES.get("Concat").data_inputs(node("Concat", ((1,), (1,), (1,))))] == [0, 1, 2]


@pytest.mark.parametrize(("mode", "joins"), [(None, True), ("nearest", True), ("linear", False), ("cubic", False)])
def test_resize_moves_values_only_when_it_repeats_them(mode: str | None, joins: bool) -> None:
    resize = node("Resize", **({"mode": mode} if mode else {}))
    assert (RULES.get("Resize").unless(resize) == "") is joins


@pytest.mark.parametrize(
    ("mode", "value", "joins"),
    [("constant", None, True), ("constant", 0.0, True), ("constant", 1.0, False), ("reflect", 1.0, True)],
)
def test_pad_joins_when_it_adds_zeros_or_known_values(mode: str, value: float | None, joins: bool) -> None:
    pad = node("Pad", ((2,), (2,)), mode=mode)
    if value is not None:
        pad.inputs.append(gs.Constant("value", np.asarray(value, np.float32)))
    assert (RULES.get("Pad").unless(pad) == "") is joins


def test_pad_with_a_value_known_at_run_time_only_stays() -> None:
    assert RULES.get("Pad").unless(node("Pad", ((2,), (2,), ())))


def test_pad_of_old_opsets_has_its_value_as_an_attribute() -> None:
    assert RULES.get("Pad").unless(node("Pad", value=0.0)) == ""
    assert RULES.get("Pad").unless(node("Pad", value=2.0))


def test_lookups_in_a_constant_table_stay_and_others_move_codes() -> None:
    gather = node("Gather", ((4, 2), (1,)))
    assert RULES.get("Gather").unless(gather) == ""
    gather.inputs[0] = gs.Constant("table", np.zeros((4, 2), np.float32))
    assert "embedding" in RULES.get("Gather").unless(gather)
