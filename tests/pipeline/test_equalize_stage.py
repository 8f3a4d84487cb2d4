"""Equalizing a graph: the float function stays, what is hard to quantize moves into the weights."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from qpipe.calibrate.errors import DataError
from qpipe.pipeline import graph
from qpipe.pipeline.calibration import Calibration
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.stages.collect import CollectOptions, collect
from qpipe.pipeline.stages.decide import wanted_tensors
from qpipe.pipeline.stages.details import wanted_details
from qpipe.pipeline.stages.equalize import equalize
from qpipe.pipeline.stages.prepare import prepare
from qpipe.pipeline.workflow import quantize_file
from quantizing import model, normal, run

LOUD = [2, 11]
NORM = """g (float[N,T,32] x) => (float[N,T,24] q, float[N,T,24] k) {
    n = LayerNormalization(x, gain, shift)  q = MatMul(n, wq)  k = MatMul(n, wk) }"""
RESIDUAL = """g (float[N,T,32] x) => (float[N,T,32] y) {
    n = LayerNormalization(x, gain, shift)  m = MatMul(n, w)  y = Add(n, m) }"""


def net(body: str) -> onnx.ModelProto:
    gain = np.ones(32, np.float32)
    gain[LOUD] = 40.0
    weights = {"wq": normal(32, 24), "wk": normal(32, 24, seed=3), "w": normal(32, 32)}
    used = {name: array for name, array in weights.items() if f", {name})" in body}
    return model(body, gain=gain, shift=normal(32), **used)


def batches() -> list[dict[str, np.ndarray]]:
    return [{"x": normal(2, 6, 32, seed=i)} for i in range(4)]


def statistics(proto: onnx.ModelProto, level: str = "gram") -> Calibration:
    prepared = prepare(graph.from_proto(proto)).graph
    return collect(proto, wanted_tensors(prepared), batches(), CollectOptions(details=wanted_details(prepared, level)))


@pytest.mark.parametrize("how", ["smoothquant", "smoothquant:0.5"])
@pytest.mark.parametrize(("body", "folded", "muls"), [(NORM, True, 0), (RESIDUAL, False, 1)])
def test_the_float_function_stays(how: str, body: str, folded: bool, muls: int) -> None:
    proto = net(body)
    work = prepare(graph.from_proto(proto))
    done = equalize(work.graph, make_recipe(equalize=how), statistics(proto))
    assert [entry.folded for entry in done] == [folded]
    assert done[0].spread > 5
    changed = graph.to_proto(work)
    onnx.checker.check_model(changed)
    assert [n.op_type for n in changed.graph.node].count("Mul") == muls
    for wanted, got in zip(run(proto, batches()[0]), run(changed, batches()[0]), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("body", [NORM, RESIDUAL])
def test_the_quantized_model_gains(body: str, tmp_path) -> None:
    onnx.save(net(body), tmp_path / "m.onnx")
    errors = {}
    for how in (None, "smoothquant"):
        recipe = make_recipe(scheme="w8a8", target="ort-cpu-vnni", method="minmax", equalize=how)
        quantize_file(tmp_path / "m.onnx", tmp_path / "q.onnx", recipe, batches(), force=True)
        pairs = zip(run(net(body), batches()[0]), run(onnx.load(tmp_path / "q.onnx"), batches()[0]), strict=True)
        errors[how] = sum(float(np.square(a - b).mean()) for a, b in pairs)
    assert errors["smoothquant"] < errors[None] / 2


def test_missing_statistics_name_the_remedy() -> None:
    proto = net(NORM)
    with pytest.raises(DataError, match="needs statistics per channel"):
        equalize(prepare(graph.from_proto(proto)).graph, make_recipe(equalize="smoothquant"), statistics(proto, "none"))


def test_excluded_layers_are_left_alone() -> None:
    proto = net(NORM)
    recipe = make_recipe(equalize="smoothquant", exclude=("op:MatMul",))
    assert equalize(prepare(graph.from_proto(proto)).graph, recipe, statistics(proto)) == []
