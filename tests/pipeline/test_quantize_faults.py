"""Models that something is wrong with, and what is said about them; from file to file."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from qpipe.calibrate.errors import DataError, ModelError, RecipeError
from qpipe.calibrate.stats.histogram import Histogram
from qpipe.pipeline import graph
from qpipe.pipeline.calibration import Calibration, TensorStats
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.stages.quantize import QuantizeOptions
from qpipe.pipeline.workflow import Job, quantize_file
from quantizing import error, model, normal, quantize, random_batches, run, signature


def product(**weights: Any) -> onnx.ModelProto:
    return model("g (float[N,4] x) => (float[N,4] y) { h = MatMul(x, w)  y = MatMul(h, v) }", **weights)


def conv(**weights: Any) -> onnx.ModelProto:
    bias = ", b" if "b" in weights else ""
    return model(f"g (float[N,3,4,4] x) => (float[N,2,4,4] y) {{ y = Conv(x, w{bias}) }}", **weights)


def spoiled(array: Any, value: float) -> Any:
    array = np.array(array)
    array.reshape(-1)[1] = value
    return array


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float) -> None:
    statistics = {"calibration": all_known("xhy")}
    with pytest.raises(ModelError, match="not finite") as caught:
        quantize(product(w=normal(4, 4), v=spoiled(normal(4, 4), value)), **statistics)
    assert "'v'" in str(caught.value.where)
    assert str(caught.value.found).startswith("1 of 16")
    assert "--skip-nonfinite" in str(caught.value.do)
    assert caught.value.exit_code == 3


def all_known(names: str) -> Calibration:
    """Statistics of normally distributed values for tensors of one letter."""
    return Calibration(tensors={name: TensorStats(histogram=Histogram.of(normal(50, 4))) for name in names})


def test_such_a_layer_can_be_left_in_float() -> None:
    source = product(w=normal(4, 4), v=spoiled(normal(4, 4), np.nan))
    found = quantize(source, calibration=all_known("xhy"), options=QuantizeOptions(skip_nonfinite=True))
    assert {d.site.node for d in found.plan.quantized()} == {"MatMul_0"}
    assert "1 values of its weight 'v' are not finite" in found.reason("MatMul_1")
    assert "v" in found.initializers()


def test_a_bias_that_is_not_finite_is_not_made_an_integer() -> None:
    found = quantize(conv(w=normal(2, 3, 1, 1), b=spoiled(normal(2), np.nan)), calibration=all_known("xy"))
    assert not [name for name, array in found.initializers().items() if array.dtype == np.int32]
    y = run(found.proto, {"x": normal(1, 3, 4, 4)})[0]
    assert np.isfinite(y[:, 0]).all()


def test_a_constant_beside_codes_that_is_not_finite_stays() -> None:
    source = model(
        "g (float[N,3,4,4] x) => (float[N,2,4,4] z) { y = Conv(x, w)  z = Mul(y, k) }",
        w=normal(2, 3, 1, 1),
        k=spoiled(normal(2, 1, 1), np.inf),
    )
    found = quantize(source, calibration=all_known("xyz"))
    assert "not finite" in found.reason("Mul_1")
    assert "k" in found.initializers()


@pytest.mark.parametrize(("w", "scale"), [(0.0, 1.0), (1e-42, 2.0**-126)])
def test_a_weight_channel_of_zeros_or_less_than_floats_hold(w: float, scale: float) -> None:
    weight = normal(2, 3, 1, 1)
    weight[1] = w
    found = quantize(conv(w=weight))
    assert found.initializers()["w_scale"][1] == np.float32(scale)
    assert error(found, random_batches(found.source, 1)[0]) < 0.05


@pytest.mark.parametrize("x", [0.0, 3.25, -7.0, 1e-40, 1e37])
def test_inputs_that_are_always_the_same(x: float) -> None:
    source = product(w=normal(4, 4) * 0.1, v=normal(4, 4) * 0.1)
    batch = {"x": np.full((2, 4), x, np.float32)}
    found = quantize(source, [batch])
    for solved in found.result.activations.values():
        assert np.isfinite(solved.params.scale)
        assert solved.params.scale >= np.finfo(np.float32).tiny
    assert np.isfinite(run(found.proto, batch)[0]).all()


@pytest.mark.parametrize(
    "body",
    [
        "c = QuantizeLinear(x, k)  d = DequantizeLinear(c, k)  y = MatMul(d, w)",
        "a, b, c = DynamicQuantizeLinear(x)  m = MatMulInteger(a, q, c)  f = Cast<to=1>(m)  y = Mul(f, k)",
        "y = com.microsoft.MatMulNBits<K=4, N=4, bits=4, block_size=16>(x, q, k)",
        "y = If(f)<then_branch = t () => (float[N,4] a) { d = DequantizeLinear(q, k)  a = MatMul(x, d) },"
        " else_branch = e () => (float[N,4] b) { b = MatMul(x, w) }>",
    ],
    ids=["qdq", "dynamic", "nbits", "inside a body"],
)
def test_a_quantized_model_is_not_quantized_again(body: str) -> None:
    flag = ", bool f" if "If(f)" in body else ""
    arrays = {"k": np.asarray(0.1, np.float32), "w": normal(4, 4), "q": np.ones((4, 4), np.int8)}
    used = {name: array for name, array in arrays.items() if re.search(rf"\b{name}\b", body)}
    text = f"g (float[N,4] x{flag}) => (float[N,4] y) {{ {body} }}"
    source = model(text, domains='"com.microsoft" : 1', **used)
    with pytest.raises(ModelError, match="quantized already") as caught:
        quantize(source, calibration=Calibration(tensors={}))
    assert "--requantize" in str(caught.value.do)


def test_what_is_float_in_it_can_be_quantized_on_request() -> None:
    body = "c = QuantizeLinear(x, k)  d = DequantizeLinear(c, k)  h = MatMul(d, w)  t = Tanh(h)  y = MatMul(t, w)"
    source = model(f"g (float[N,4] x) => (float[N,4] y) {{ {body} }}", k=np.asarray(0.05, np.float32), w=normal(4, 4))
    found = quantize(source, options=QuantizeOptions(requantize=True))
    assert {d.site.node for d in found.plan.quantized()} == {"MatMul_2", "MatMul_4"}
    assert error(found, random_batches(source, 1)[0]) < 0.05


def test_from_file_to_file(tmp_path: Path) -> None:
    source = conv(w=normal(2, 3, 1, 1), b=normal(2))
    onnx.save(source, tmp_path / "float.onnx")
    done = quantize_file(tmp_path / "float.onnx", tmp_path / "int8.onnx", data=random_batches(source))
    written = onnx.load(tmp_path / "int8.onnx")
    assert signature(written) == signature(source)
    assert {node.op_type for node in written.graph.node} == {"QuantizeLinear", "DequantizeLinear", "Conv"}
    assert written.metadata_props[-1].key.startswith("qpipe.")
    assert len(done.plan.quantized()) == 3
    again = quantize_file(tmp_path / "float.onnx", tmp_path / "again.onnx", data=random_batches(source))
    assert (tmp_path / "int8.onnx").read_bytes() == (tmp_path / "again.onnx").read_bytes()
    assert again.plan == done.plan


def test_statistics_are_asked_for_and_nothing_is_written(tmp_path: Path) -> None:
    onnx.save(product(w=normal(4, 4), v=normal(4, 4)), tmp_path / "float.onnx")
    with pytest.raises(DataError, match="statistics"):
        quantize_file(tmp_path / "float.onnx", tmp_path / "int8.onnx")
    assert not (tmp_path / "int8.onnx").exists()


def test_an_old_file_is_refused_unless_it_is_to_be_converted(tmp_path: Path) -> None:
    source = model("g (float[2,4] x) => (float[2,4] y) { y = MatMul(x, w) }", opset=8, ir=3, w=normal(4, 4))
    entry = onnx.helper.make_tensor_value_info("w", 1, [4, 4])
    source.graph.input.append(entry)
    onnx.save(source, tmp_path / "old.onnx")
    with pytest.raises(ModelError, match="opset 8"):
        Job.open(tmp_path / "old.onnx")
    job = Job.open(tmp_path / "old.onnx", convert=True)
    done = job.quantize(make_recipe(), job.collect(random_batches(source)))
    assert len(done.plan.quantized()) == 2


def test_int_only_models_pass_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = model("g (int64[2] x) => (int64[2] y) { y = Add(x, x) }")
    onnx.save(source, tmp_path / "float.onnx")
    with caplog.at_level(logging.WARNING):
        done = quantize_file(tmp_path / "float.onnx", tmp_path / "int8.onnx", data=Calibration(tensors={}))
    assert not done.plan.quantized()
    assert "nothing was quantized; of 1 nodes the first: its input 'x' is int64, not float" in caplog.text
    assert run(onnx.load(tmp_path / "int8.onnx"), {"x": np.array([1, 2])})[0].tolist() == [2, 4]


def test_an_unknown_target_is_refused_with_near_names() -> None:
    with pytest.raises(RecipeError) as caught:
        quantize(product(w=normal(4, 4), v=normal(4, 4)), calibration=all_known("xhy"), target="ort-cpuu")
    assert "ort-cpu" in str(caught.value.expected)


def test_the_source_is_not_changed(tmp_path: Path) -> None:
    source = conv(w=normal(2, 3, 1, 1), b=normal(2))
    onnx.save(source, tmp_path / "float.onnx")
    before = (tmp_path / "float.onnx").read_bytes()
    quantize_file(tmp_path / "float.onnx", tmp_path / "int8.onnx", data=random_batches(source))
    assert (tmp_path / "float.onnx").read_bytes() == before
    loaded = graph.load(tmp_path / "float.onnx")
    assert graph.to_proto(loaded) == graph.to_proto(graph.from_proto(source))
