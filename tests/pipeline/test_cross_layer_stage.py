"""Cross-layer equalization of a graph: the float function stays, int8 weights with one scale per tensor gain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from qpipe.calibrate.errors import DataError
from qpipe.pipeline import graph
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.stages.cross_layer import balance
from qpipe.pipeline.stages.prepare import prepare
from qpipe.pipeline.workflow import Job, quantize_file
from quantizing import model, normal, run

CONVS = """g (float[N,3,8,8] x) => (float[N,5] y) {
    a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w1, b1)  r = Relu(a)
    d = Conv<kernel_shape=[3,3], pads=[1,1,1,1], group=16>(r, w2, b2)  s = Relu(d)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(s)
    e = Conv<kernel_shape=[1,1]>(p, w3)  y = ReduceMean<keepdims=0>(e, axes) }"""
GEMMS = """g (float[N,12] x) => (float[N,5] y) {
    a = Gemm<transB=1>(x, w1, b1)  r = Relu(a)  y = Gemm(r, w2) }"""


def uneven(channels: int) -> np.ndarray:
    return np.exp(np.random.default_rng(5).normal(scale=2.0, size=channels)).astype(np.float32)


def convs() -> onnx.ModelProto:
    """Channels differ by orders of magnitude, as folding BatchNorm leaves them."""
    gain = uneven(16)
    return model(
        CONVS,
        w1=normal(16, 3, 3, 3) * gain[:, None, None, None],
        b1=0.1 * normal(16) * gain,
        w2=normal(16, 1, 3, 3, seed=2) / gain[:, None, None, None],
        b2=0.1 * normal(16, seed=3),
        w3=normal(5, 16, 1, 1, seed=4),
        axes=np.array([2, 3], np.int64),
    )


def gemms() -> onnx.ModelProto:
    gain = uneven(20)
    return model(
        GEMMS, w1=normal(20, 12) * gain[:, None], b1=0.1 * normal(20), w2=normal(20, 5, seed=2) / gain[:, None]
    )


def batches(proto: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    shape = [d.dim_value or 8 for d in proto.graph.input[0].type.tensor_type.shape.dim]
    return [{"x": normal(*shape, seed=i)} for i in range(4)]


@pytest.mark.parametrize(("proto", "length"), [(convs(), 3), (gemms(), 2)], ids=["convs", "gemms"])
def test_the_float_function_stays(proto: onnx.ModelProto, length: int) -> None:
    work = prepare(graph.from_proto(proto))
    chains = balance(work.graph)
    assert [len(chain) for chain in chains] == [length]
    changed = graph.to_proto(work)
    onnx.checker.check_model(changed)
    feed = batches(proto)[0]
    (wanted,), (got,) = run(proto, feed), run(changed, feed)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    assert balance(work.graph) == [], "once balanced, nothing moves"


@pytest.mark.parametrize("proto", [convs(), gemms()], ids=["convs", "gemms"])
def test_one_scale_per_tensor_gains(proto: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(proto, tmp_path / "m.onnx")
    errors = {}
    for how in ("none", "cross_layer"):
        keys = {"weights": {"granularity": "tensor", "algorithm": "rtn"}, "target": "ort-cpu-vnni", "method": "minmax"}
        recipe = make_recipe(scheme="w8a8", equalize=how, **keys)
        quantize_file(tmp_path / "m.onnx", tmp_path / "q.onnx", recipe, batches(proto), force=True)
        quantized = onnx.load(tmp_path / "q.onnx")
        (wanted,), (got,) = run(proto, batches(proto)[0]), run(quantized, batches(proto)[0])
        errors[how] = float(np.square(wanted - got).mean())
    assert errors["cross_layer"] < errors["none"] / 3


@pytest.mark.parametrize(
    "between",
    ["r = Sigmoid(a)", "r = Clip(a, low, high)", "z = Relu(a)  r = Add(z, z)"],
    ids=["no factor passes", "a limit", "two readers"],
)
def test_chains_end_where_a_factor_does_not_pass(between: str) -> None:
    extra = {"low": np.float32(0).reshape(()), "high": np.float32(6).reshape(())} if "low" in between else {}
    body = GEMMS.replace("r = Relu(a)", between)
    weights = {"w1": normal(20, 12) * uneven(20)[:, None], "b1": normal(20), "w2": normal(20, 5)}
    assert balance(prepare(graph.from_proto(model(body, **weights, **extra))).graph) == []


def test_an_inner_tensor_that_is_an_output_keeps_its_values() -> None:
    proto = gemms()
    proto.graph.output.append(onnx.helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, ["N", 20]))
    assert balance(prepare(graph.from_proto(proto)).graph) == []


def test_statistics_of_before_are_refused(tmp_path: Path) -> None:
    onnx.save(gemms(), tmp_path / "m.onnx")
    known = Job.open(tmp_path / "m.onnx").collect(batches(gemms()))
    with pytest.raises(DataError, match="cross_layer") as caught:
        quantize_file(tmp_path / "m.onnx", tmp_path / "q.onnx", make_recipe(equalize="cross_layer"), known)
    assert "--data" in str(caught.value.do)
    assert not (tmp_path / "q.onnx").exists()
