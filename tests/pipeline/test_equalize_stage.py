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
from qpipe.pipeline.stages.decide import decide, wanted_tensors
from qpipe.pipeline.stages.details import wanted_details
from qpipe.pipeline.stages.equalize import Equalized, equalize
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
    return [{"x": normal(16, 6, 32, seed=i)} for i in range(4)]


def statistics(proto: onnx.ModelProto, level: str = "gram") -> Calibration:
    prepared = prepare(graph.from_proto(proto)).graph
    return collect(proto, wanted_tensors(prepared), batches(), CollectOptions(details=wanted_details(prepared, level)))


def equalized(
    proto: onnx.ModelProto, calibration: Calibration, **keys
) -> tuple[graph.Model, list[Equalized], Calibration]:
    """Return a model after equalizing, what was done, and the statistics that go with it."""
    recipe = make_recipe(**{"target": "ort-cpu-vnni", **keys})
    work = prepare(graph.from_proto(proto))
    done, known = equalize(work.graph, decide(work.graph, recipe, calibration), recipe, calibration)
    assert known is not None
    return work, done, known


def float_function_stays(proto: onnx.ModelProto, work: graph.Model) -> onnx.ModelProto:
    changed = graph.to_proto(work)
    onnx.checker.check_model(changed)
    for wanted, got in zip(run(proto, batches()[0]), run(changed, batches()[0]), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    return changed


@pytest.mark.parametrize("how", ["auto", "smoothquant", "smoothquant:0.5"])
@pytest.mark.parametrize(("body", "folded", "muls"), [(NORM, True, 0), (RESIDUAL, False, 1)])
def test_the_float_function_stays(how: str, body: str, folded: bool, muls: int) -> None:
    proto = net(body)
    work, done, _ = equalized(proto, statistics(proto), equalize=how)
    assert [entry.folded for entry in done] == [folded]
    assert done[0].spread > 5
    changed = float_function_stays(proto, work)
    assert [n.op_type for n in changed.graph.node].count("Mul") == muls
    products = [node for node in work.graph.nodes if node.op == "MatMul"]
    assert all(node.inputs[1]._values.takes_work for node in products), "an equalized weight is held as a whole"


@pytest.mark.parametrize("level", ["channels", "gram"])
@pytest.mark.parametrize("body", [NORM, RESIDUAL])
def test_statistics_of_the_new_tensor_follow_from_those_of_the_old_one(body: str, level: str) -> None:
    """What a second collection would have found: the channels exactly, the range as an interval that holds it."""
    proto = net(body)
    work, _, known = equalized(proto, statistics(proto, level))
    details = wanted_details(work.graph, level)
    again = collect(graph.to_proto(work), wanted_tensors(work.graph), batches(), CollectOptions(details=details))
    (name,) = [name for name in known.tensors if name.endswith("_equalized")]
    ours, found = known.tensors[name], again.tensors[name]
    assert ours.channels is not None
    assert found.channels is not None
    np.testing.assert_allclose(ours.channels.amax, found.channels.amax, rtol=1e-5)
    np.testing.assert_allclose(ours.channels.energy, found.channels.energy, rtol=1e-4)
    assert (
        ours.histogram.lo <= found.histogram.lo * (1 - 1e-5) < 0 < found.histogram.hi * (1 - 1e-5) <= ours.histogram.hi
    )
    assert ours.histogram.amax == pytest.approx(found.histogram.amax, rel=1e-5)
    if level == "gram":
        assert ours.gram is not None
        assert found.gram is not None
        scale = np.abs(found.gram.matrix).max()
        np.testing.assert_allclose(ours.gram.matrix, found.gram.matrix, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("body", [NORM, RESIDUAL])
def test_the_quantized_model_gains(body: str, tmp_path) -> None:
    onnx.save(net(body), tmp_path / "m.onnx")
    errors = {}
    for how in (None, "auto", "smoothquant"):
        recipe = make_recipe(scheme="w8a8", target="ort-cpu-vnni", method="minmax", equalize=how)
        quantize_file(tmp_path / "m.onnx", tmp_path / "q.onnx", recipe, batches(), force=True)
        pairs = zip(run(net(body), batches()[0]), run(onnx.load(tmp_path / "q.onnx"), batches()[0]), strict=True)
        errors[how] = sum(float(np.square(a - b).mean()) for a, b in pairs)
    assert errors["smoothquant"] < errors[None] / 2
    assert errors["auto"] < errors[None] / 2


FOLDS = {
    "Gemm": "m = Gemm(x, w, b)",
    "Gemm transposed": "m = Gemm<transB=1>(x, w, b)",
    "MatMul and bias": "p = MatMul(x, w)  m = Add(p, b)",
    "Relu between": "p = MatMul(x, w)  q = Add(p, b)  m = Relu(q)",
    "gain": "q = Sigmoid(x)  m = Mul(q, b)",
}


@pytest.mark.parametrize("how", FOLDS)
def test_a_scale_folds_into_what_is_linear_before(how: str) -> None:
    w, b = normal(32, 32), normal(32)
    w[:, LOUD] *= 40
    b[LOUD] = 60
    weights = {"w": w.T.copy() if "transB" in FOLDS[how] else w, "b": b, "v": normal(32, 16, seed=7)}
    proto = model(
        f"g (float[N,32] x) => (float[N,16] y) {{ {FOLDS[how]}  y = MatMul(m, v) }}",
        **{name: array for name, array in weights.items() if name != "w" or ", w" in FOLDS[how]},
    )
    data = [{"x": normal(8, 32, seed=i)} for i in range(4)]
    work = prepare(graph.from_proto(proto))
    options = CollectOptions(details=wanted_details(work.graph, "channels"))
    known = collect(proto, wanted_tensors(work.graph), data, options)
    recipe = make_recipe(target="ort-cpu-vnni", equalize="smoothquant:0.8")
    done, _ = equalize(work.graph, decide(work.graph, recipe, known), recipe, known)
    assert [entry.folded for entry in done if entry.tensor == "m"] == [True]
    changed = graph.to_proto(work)
    onnx.checker.check_model(changed)
    (wanted,), (got,) = run(proto, data[0]), run(changed, data[0])
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_an_output_of_the_model_keeps_its_values() -> None:
    proto = net(NORM.replace("=> (", "=> (float[N,T,32] n, "))
    work, done, _ = equalized(proto, statistics(proto))
    assert [entry.folded for entry in done] == [False]
    float_function_stays(proto, work)


def test_missing_statistics_name_the_remedy() -> None:
    proto = net(NORM)
    with pytest.raises(DataError, match="needs statistics per channel") as caught:
        equalized(proto, statistics(proto, "none"), equalize="smoothquant")
    assert "--detail channels" in str(caught.value.do)
    _, done, _ = equalized(proto, statistics(proto, "none"), equalize="auto")
    assert done == []


def test_layers_that_stay_in_float_are_left_alone() -> None:
    proto = net(NORM)
    assert equalized(proto, statistics(proto), equalize="smoothquant", exclude=("op:MatMul",))[1] == []


@pytest.mark.parametrize("scheme", ["w8", "w4", "w8a8-dynamic"])
def test_auto_leaves_layers_without_static_activations_alone(scheme: str) -> None:
    proto = net(NORM)
    assert equalized(proto, statistics(proto), scheme=scheme)[1] == []
