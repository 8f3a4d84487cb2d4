"""What statistics a recipe asks for: no tensor more, and none too few."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from qpipe.calibrate.errors import RecipeError
from qpipe.calibrate.stats.histogram import Histogram
from qpipe.pipeline import graph
from qpipe.pipeline.calibration import Calibration, TensorStats, load
from qpipe.pipeline.cli import main
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.stages.decide import decide, wanted_tensors
from qpipe.pipeline.stages.needed import needed_tensors
from qpipe.pipeline.stages.prepare import prepare
from qpipe.pipeline.targets import TARGETS
from qpipe.pipeline.workflow import Job, quantize_file
from quantizing import model, normal
from random_graphs import models

FEED_FORWARD = """g (float[N,8] x) => (float[N,8] y) {
    a = MatMul(x, w)  b = Add(a, bias)  c = Tanh(b)  d = MatMul(c, v)  y = Add(d, x)
}"""
CONVS = """g (float[1,2,4,4] x) => (float[1,2,2,2] y) {
    a = Conv(x, w)  b = Relu(a)  c = Conv(b, w)  y = AveragePool<kernel_shape=[3,3]>(c)
}"""


def feed_forward() -> onnx.ModelProto:
    return model(FEED_FORWARD, w=normal(8, 8), bias=normal(8), v=normal(8, 8, seed=1))


def needed(source: onnx.ModelProto, **recipe: object) -> list[str]:
    inner = prepare(graph.from_proto(source)).graph
    return needed_tensors(inner, make_recipe(**recipe) if recipe else None)


def test_only_what_layers_read_where_products_give_floats() -> None:
    assert needed(feed_forward()) == ["x", "c"]


def test_outputs_too_where_products_give_codes_behind_what_the_quantizer_absorbs() -> None:
    assert needed(model(CONVS, w=normal(2, 2, 1, 1))) == ["x", "b", "c", "y"]


def test_the_output_before_a_relu_that_a_symmetric_quantizer_does_not_absorb() -> None:
    source = model(CONVS, w=normal(2, 2, 1, 1))
    assert "a" in needed(source, activations={"format": "int8", "symmetric": True})


def test_float16_looks_up_every_range() -> None:
    source = feed_forward()
    assert needed(source, scheme="fp16") == wanted_tensors(prepare(graph.from_proto(source)).graph)


def test_what_a_body_computes_tells_whether_it_ran() -> None:
    source = model(
        """g (float[2,4] x, bool f) => (float[2,4] y) {
            y = If(f)<then_branch = t () => (float[2,4] a) { a = MatMul(x, w) },
                      else_branch = e () => (float[2,4] b) { b = Relu(x) }>
        }""",
        w=normal(4, 4),
    )
    assert set(needed(source)) == {"x", "a", "b"}


def test_a_pattern_that_matches_nothing_is_refused_before_anything_runs() -> None:
    with pytest.raises(RecipeError, match="nonesuch"):
        needed(feed_forward(), exclude=["nonesuch"])


@settings(max_examples=40, deadline=None)
@given(models())
def test_decisions_are_those_that_all_statistics_would_have_brought(source: onnx.ModelProto) -> None:
    inner = prepare(graph.from_proto(source)).graph
    seen = TensorStats(histogram=Histogram.of(np.linspace(-1, 1, 50, dtype=np.float32)))
    some = Calibration(tensors=dict.fromkeys(needed_tensors(inner), seen))
    every = Calibration(tensors=dict.fromkeys(wanted_tensors(inner), seen))
    for name in TARGETS.names():
        recipe = make_recipe(target=name)
        assert decide(inner, recipe, some).decisions == decide(inner, recipe, every).decisions
        for one in (recipe, make_recipe(target=name, activations={"symmetric": True})):
            own = Calibration(tensors=dict.fromkeys(needed_tensors(inner, one), seen))
            assert decide(inner, one, own).decisions == decide(inner, one, every).decisions


@pytest.mark.parametrize(("choice", "tensors"), [([], ["x", "c"]), (["--tensors", "all"], list("xabcdy"))])
def test_calibrate_keeps_what_is_asked_for(tmp_path: Path, choice: list[str], tensors: list[str]) -> None:
    onnx.save(feed_forward(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=normal(4, 8))
    command = ["calibrate", str(tmp_path / "m.onnx"), "--data", str(tmp_path / "d.npz"), "-o", str(tmp_path / "m.qcal")]
    assert main([*command, *choice]) == 0
    assert set(load(tmp_path / "m.qcal").tensors) == set(tensors)


def test_a_relu_goes_along_with_the_products_that_are_included() -> None:
    source = model(CONVS, w=normal(2, 2, 1, 1))
    inner = prepare(graph.from_proto(source)).graph
    known = Calibration(tensors=dict.fromkeys(needed_tensors(inner), TensorStats(histogram=Histogram.of(normal(50)))))
    plan = decide(inner, make_recipe(include=["op:Conv"]), known)
    assert {d.site.tensor for d in plan.quantized() if d.site.role == "output"} == {"b", "c"}


def test_float16_from_statistics_of_other_tensors_says_what_is_missing(tmp_path: Path) -> None:
    onnx.save(feed_forward(), tmp_path / "m.onnx")
    job = Job.open(tmp_path / "m.onnx")
    known = job.collect([{"x": normal(4, 8)}])
    done = job.quantize(make_recipe(scheme="fp16", target="portable"), known)
    assert any("--tensors all" in note for note in done.notes)
    job = Job.open(tmp_path / "m.onnx")
    known = job.collect([{"x": normal(4, 8)}], tensors=job.wanted())
    assert not job.quantize(make_recipe(scheme="fp16", target="portable"), known).notes


def test_what_an_algorithm_looks_at_is_collected_where_activations_stay_float(tmp_path: Path) -> None:
    body = "g (float[1,2,4,4] x) => (float[1,2,4,4] y) { a = Conv(x, w)  b = Relu(a)  y = Conv(b, w) }"
    onnx.save(model(body, w=normal(2, 2, 1, 1)), tmp_path / "m.onnx")
    recipe = make_recipe(scheme="w8", weights={"algorithm": "gptq", "sequential": False})
    batches = [{"x": normal(1, 2, 4, 4, seed=i)} for i in range(4)]
    found = quantize_file(tmp_path / "m.onnx", tmp_path / "q.onnx", recipe, batches)
    assert {d.algorithm for d in found.plan.quantized()} == {"gptq"}
