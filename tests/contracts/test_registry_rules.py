"""Every operator rule keeps the contract of `OpRule`."""

from __future__ import annotations

import onnx
import pytest
from qpipe.pipeline.rules import MICROSOFT, RULES, OpRule

STANDARD = [(name, rule) for name, rule in RULES.items() if not rule.domain]
KINDS = {"weighted", "elementwise", "passthrough", "absorbed", "float"}


@pytest.mark.parametrize(("name", "rule"), list(RULES.items()), ids=RULES.names())
def test_name_kind_and_reason(name: str, rule: OpRule) -> None:
    assert name == (f"{rule.domain}::{rule.op}" if rule.domain else rule.op)
    assert rule.domain in ("", MICROSOFT)
    assert rule.kind in KINDS
    assert rule.reason
    assert not rule.reason.endswith(".")


# Operators that ONNX Runtime has under the standard domain although ONNX does not define them.
FOREIGN = {"SimplifiedLayerNormalization"}


@pytest.mark.parametrize(("name", "rule"), STANDARD, ids=[name for name, _ in STANDARD])
def test_the_operator_exists_and_its_slots_too(name: str, rule: OpRule) -> None:
    if name in FOREIGN:
        return
    schema = onnx.defs.get_schema(name)
    variadic = schema.inputs and schema.inputs[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic
    slots = [*(rule.data or ()), *(slot for slot in (rule.weight, rule.bias) if slot is not None)]
    if rule.kind != "float":
        assert variadic or max(slots) < len(schema.inputs)
        assert all(slot >= 0 for slot in slots)


@pytest.mark.parametrize(("name", "rule"), STANDARD, ids=[name for name, _ in STANDARD])
def test_weights_belong_to_weighted_operators(name: str, rule: OpRule) -> None:
    assert (rule.weight is not None) == (rule.kind == "weighted")
    if rule.kind == "weighted":
        assert rule.data is not None
        assert rule.weight in rule.data
    assert rule.bias is None or rule.kind == "weighted"
