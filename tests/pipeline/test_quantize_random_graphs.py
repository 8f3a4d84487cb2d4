"""Any valid model comes out valid, with its interface as it was, and equal where scales are fine."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from quantizing import FINE, Result, error, quantize, run, signature
from random_graphs import batches, models

RELAXED = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example, HealthCheck.data_too_large],
)


def every_node_is_decided(found: Result) -> bool:
    """Whether each node that is left in the prepared graph got decisions with reasons."""
    return all(decision.reason for decision in found.plan.decisions)


@RELAXED
@given(models())
def test_the_quantized_model_equals_the_float_one_where_scales_are_fine(model: onnx.ModelProto) -> None:
    found = quantize(model, batches(), **FINE)
    assert signature(found.proto) == signature(model)
    assert every_node_is_decided(found)
    assert max(error(found, batch) for batch in batches()) < 0.01


@pytest.mark.parametrize("recipe", [{}, {"activations": {"format": "int8", "symmetric": True}}], ids=["u8", "s8"])
@RELAXED
@given(model=models())
def test_8_bits_give_a_model_that_runs(recipe: dict[str, Any], model: onnx.ModelProto) -> None:
    found = quantize(model, batches(), **recipe)
    assert signature(found.proto) == signature(model)
    for batch in batches():
        run(found.proto, batch)
        run(found.proto, batch, exact=False)
