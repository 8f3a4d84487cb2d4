"""Targets: their facts hang together, and those that can be looked up here are so."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from qpipe.calibrate.errors import ModelError, RecipeError
from qpipe.calibrate.formats import FORMATS
from qpipe.pipeline import ceilings
from qpipe.pipeline.checks.targets import traits_of
from qpipe.pipeline.cpu import int8_saturates
from qpipe.pipeline.forms import FORMS
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.rules import RULES
from qpipe.pipeline.schemes import SCHEMES
from qpipe.pipeline.session import SessionExtras, make_session
from qpipe.pipeline.stages.choice import adapt, form_of
from qpipe.pipeline.targets import TARGETS, Target
from quantizing import model, normal, quantize, run

NAMES = TARGETS.names()


def targets() -> list[Any]:
    return [pytest.param(target, id=name) for name, target in TARGETS.items()]


@pytest.mark.parametrize("target", targets())
def test_facts_name_things_that_exist(target: Target) -> None:
    assert target.summary
    assert target.source
    assert traits_of(target.name)
    for op in (*target.kernels, *(op for ops in target.forms.values() for op in ops)):
        assert op in RULES, op
    assert {*target.needs_output, *target.int32_bias} <= target.kernels
    assert set(target.forms) <= {"weights", *FORMS.names()}
    named = {target.activation_format, *target.refused, *target.emulated, *target.weight_formats, *target.float_types}
    assert all(name in FORMATS for name in named), named
    assert not set(target.refused) & set(target.emulated)
    assert target.asymmetric or target.activation_symmetric


@pytest.mark.parametrize("target", targets())
def test_the_checker_agrees_with_the_target(target: Target) -> None:
    traits = traits_of(target.name)
    assert traits.symmetric == (not target.asymmetric)
    types = {FORMATS.get(name).onnx_type for name in target.weight_formats} | {
        FORMATS.get(target.activation_format).onnx_type
    }
    assert types <= traits.types | {"FLOAT16", "BFLOAT16"}


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("name", NAMES)
def test_every_scheme_meets_every_target(scheme: str, name: str) -> None:
    """A product becomes what the target runs, or stays with a reason; what comes out passes the checker."""
    body = "g (float[N,128] x) => (float[N,32] y) { a = MatMul(x, w)  y = Add(a, b) }"
    source = model(body, w=normal(128, 32), b=normal(32))
    target = TARGETS.get(name)
    float_type = SCHEMES[scheme].keys.get("float_type")
    if float_type and float_type not in target.float_types:
        with pytest.raises(RecipeError, match=f"has no {float_type}"):
            quantize(source, scheme=scheme, target=name)
        return
    found = quantize(source, scheme=scheme, target=name)
    decision = found.plan.nodes()["MatMul_0"]
    if decision.spec is None:
        assert scheme == "float" or name in decision.reason
        return
    if decision.form not in ("cast", "outlier"):
        assert decision.form == form_of("MatMul", adapt(make_recipe(scheme=scheme, target=name), target), target)
    if (name.startswith("ort-cpu") or name == "portable") and scheme != "bf16":  # ONNX Runtime has no bfloat16 MatMul
        x = np.abs(normal(4, 128, seed=3))
        got, wanted = (run(p, {"x": x})[0] for p in (found.proto, source))
        saturates = name == "portable" and scheme == "w8a8-dynamic" and int8_saturates()
        assert np.abs(got - wanted).max() < (0.5 if saturates or "4" in scheme else 0.1) * np.abs(wanted).max()


def test_opset_ceilings_are_what_the_installed_runtime_runs() -> None:
    """A runtime that moved on makes this fail on purpose: then the ceiling can be raised."""
    measured = ceilings.measure()["max_qdq_opset"]
    for name in ("ort-cpu", "ort-cpu-avx2", "ort-cpu-vnni"):
        assert TARGETS.get(name).opset_ceiling <= measured


def test_a_model_above_the_ceiling_is_lowered_before_codes_enter() -> None:
    newest = onnx.defs.onnx_opset_version()
    if newest <= TARGETS.get("ort-cpu").opset_ceiling:
        pytest.skip("this onnx has no opset above the ceiling")
    source = model("g (float[N,8] x) => (float[N,4] y) { y = MatMul(x, w) }", opset=newest, ir=13, w=normal(8, 4))
    found = quantize(source, scheme="w8", target="ort-cpu")
    assert found.result.model.opset <= TARGETS.get("ort-cpu").opset_ceiling
    assert run(found.proto, {"x": normal(2, 8)})[0].shape == (2, 4)


def test_onnxruntime_still_refuses_float8_activations() -> None:
    """The reason that the target gives; when this fails the target can run them."""
    source = model("g (float[N,64] x) => (float[N,32] y) { y = MatMul(x, w) }", w=normal(64, 32))
    full = quantize(source, scheme="fp8", target="tensorrt")
    assert full.ops()["QuantizeLinear"] == 1
    run(full.proto, {"x": normal(2, 64)})
    with pytest.raises(ModelError, match="refuses"):
        run(full.proto, {"x": normal(2, 64)}, exact=False)


def test_onnxruntime_takes_softmax_apart_in_float16(tmp_path: Path) -> None:
    """Why the target keeps some operators in float32."""
    body = "g (float16[N,8] x) => (float16[N,8] y) { y = Softmax(x) }"
    path = tmp_path / "optimized.onnx"
    make_session(model(body, opset=20), extras=SessionExtras(optimized_model=path))
    ops = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert ops["Softmax"] == 0
    assert sum(ops.values()) > 3
    assert "Softmax" in TARGETS.get("ort-cpu").float32_ops


@pytest.mark.parametrize("part", ["weights", "activations"])
def test_tensorrt_takes_no_zero_points(part: str) -> None:
    source = model("g (float[N,8] x) => (float[N,4] y) { y = MatMul(x, w) }", w=normal(8, 4))
    with pytest.raises(RecipeError, match="zero points of 0 only"):
        quantize(source, target="tensorrt", **{part: {"symmetric": False}})
    found = quantize(source, target="tensorrt", scheme="w4")
    assert [d.spec.symmetric for d in found.plan.quantized() if d.spec] == [True]


def test_tensorrt_refuses_formats_that_it_does_not_run() -> None:
    source = model("g (float[N,64] x) => (float[N,4] y) { y = MatMul(x, w) }", w=normal(64, 4))
    found = quantize(source, target="tensorrt", scheme="w8", weights="int16")
    assert "tensorrt runs no int16 weights" in found.reason("MatMul_0")


def test_openvino_runs_integers_and_equals_what_is_written() -> None:
    """Its int8 kernels saturate without VNNI as ONNX Runtime's do: the same limit on weights keeps them exact."""
    openvino = pytest.importorskip("openvino")
    body = "g (float[16,256] x) => (float[16,128] y) { y = MatMul(x, w) }"
    source = model(body, w=normal(256, 128))
    found = quantize(source, [{"x": np.abs(normal(16, 256))}], scheme="w8a8", target="openvino")
    x = np.abs(normal(16, 256, seed=1)).clip(0, 3)
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(found.proto.SerializeToString()), "CPU")
    got, expected = next(iter(compiled({"x": x}).values())), run(found.proto, {"x": x})[0]
    step = found.scale_of("x") * np.abs(found.initializers()["w_scale"]).max() * 127
    assert np.abs(got - expected).max() <= 2 * step  # its quantizer multiplies by the reciprocal of the scale
    layers = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    kinds = {str(info["layerType"].astype(str)): str(info["runtimePrecision"].astype(str)) for info in layers}
    assert kinds["FullyConnected"] in ("u8", "i8")
