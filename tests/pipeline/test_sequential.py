"""Layer by layer: every layer is quantized on what the quantized layers before it give, in one walk over the model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from qpipe.calibrate.errors import DataError
from qpipe.calibrate.metrics import mse
from qpipe.calibrate.qarray import dequantize
from qpipe.calibrate.stats.gram import Gram
from qpipe.calibrate.weights import WeightStats
from qpipe.pipeline import graph, segments
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.segments import Cuts, Stream
from qpipe.pipeline.stages import sequential
from qpipe.pipeline.stages.decide import decide
from qpipe.pipeline.stages.prepare import prepare
from qpipe.pipeline.stages.quantize import needed_detail, needs_statistics
from qpipe.pipeline.stages.sequential import Data, quantize_in_order
from qpipe.pipeline.workflow import Job, quantize_file
from quantizing import model, normal, run

CHAIN = """g (float[N,T,32] x) => (float[N,T,16] y) {
    a = MatMul(x, w1)  b = Relu(a)  c = MatMul(b, w2)  r = Add(c, x)  t = Transpose<perm=[1,0]>(w3)
    q = MatMul(r, t)  k = MatMul(r, w4)  s = Add(q, k)  y = MatMul(s, w5) }"""
BRANCHY = """g (float[N,T,32] x) => (float[N,T,16] y) {
    a = MatMul(x, w1)  b = Relu(a)  c = MatMul(b, w2)  d = If(flag) <
      then_branch = yes () => (float[N,T,32] e) { e = Relu(c) },
      else_branch = no () => (float[N,T,32] f) { f = Neg(c) }>
    y = MatMul(d, w5) }"""


def weights() -> dict[str, np.ndarray]:
    return {
        "w1": normal(32, 64, seed=1),
        "w2": normal(64, 32, seed=2),
        "w3": normal(16, 32, seed=3),
        "w4": normal(32, 16, seed=4),
        "w5": normal(16, 16, seed=5),
    }


def chain() -> onnx.ModelProto:
    return model(CHAIN, **weights())


def branchy() -> onnx.ModelProto:
    return model(BRANCHY, w1=weights()["w1"], w2=weights()["w2"], w5=normal(32, 16, seed=6), flag=np.array(True))


def batches(count: int = 6, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Inputs with a few strong directions; the last batch is of another size."""
    mixing = normal(8, 32, seed=99)
    sizes = [4] * (count - 1) + [3]
    return [
        {"x": normal(n, 20, 8, seed=seed + i) @ mixing + normal(n, 20, 32, seed=50 + i)} for i, n in enumerate(sizes)
    ]


def recipe(**weights: object):
    return make_recipe(scheme="w4", weights={"algorithm": "gptq", "accuracy_level": 1, **weights})


def by_plan(proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> tuple:
    """Return plan, codes by node, and the statistics that each layer was quantized with."""
    seen: dict[str, WeightStats] = {}

    def note(floats, rounded, tensor, detail):
        seen[tensor] = original(floats, rounded, tensor, detail)
        return seen[tensor]

    original = sequential._statistics
    monkeypatch.setattr(sequential, "_statistics", note)
    work = prepare(graph.from_proto(proto))
    plan = decide(work.graph, recipe(), None)
    found = quantize_in_order(work, plan, Data(batches=batches()))
    return plan, {site.node: qarray for site, qarray in found.items()}, seen


def test_each_layer_sees_what_the_quantized_layers_before_it_give(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, codes, seen = by_plan(chain(), monkeypatch)
    inputs = {d.site.node: d.site for d in plan.quantized()}
    places = {site.tensor: dequantize(codes[node]) for node, site in inputs.items()}
    assert set(seen) == {"x", "b", "r", "s"}
    w = {name: places.get(name, array) for name, array in weights().items()}
    turned = next(dequantize(codes[node]) for node, site in inputs.items() if site.tensor == "t")
    x = np.concatenate([batch["x"].reshape(-1, 32) for batch in batches()])
    b = np.maximum(x @ w["w1"], 0)
    r = b @ w["w2"] + x
    s = r @ turned + r @ w["w4"]
    for tensor, values in {"x": x, "b": b, "r": r, "s": s}.items():
        wanted = Gram.of(values.astype(np.float32)).matrix
        np.testing.assert_allclose(seen[tensor].gram.matrix, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(seen["x"].drift).max() == 0, "nothing is quantized in front of the first layer"
    own = np.maximum(x @ weights()["w1"], 0)
    drift = (own - b).astype(np.float64).T @ b
    np.testing.assert_allclose(seen["b"].drift, drift, rtol=1e-2, atol=2e-3 * np.abs(drift).max())


@pytest.mark.parametrize("make", [chain, branchy])
def test_outputs_on_new_data_are_better_than_by_the_float_models_inputs(make) -> None:
    proto, errors = make(), {}
    fresh = batches(seed=1000)
    for in_order in (True, False):
        got = quantized_file_model(proto, in_order)
        errors[in_order] = sum(mse(run(proto, b)[0], run(got, b)[0]) for b in fresh)
    assert errors[True] < 0.95 * errors[False]


def quantized_file_model(proto: onnx.ModelProto, in_order: bool) -> onnx.ModelProto:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        onnx.save(proto, Path(folder) / "m.onnx")
        quantize_file(Path(folder) / "m.onnx", Path(folder) / "q.onnx", recipe(sequential=in_order), iter(batches()))
        return onnx.load(Path(folder) / "q.onnx")


def test_every_node_runs_once_per_batch_however_many_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The segments of one stream hold each node at most once; the tail behind the last layer is not run at all."""
    ran: list[str] = []
    original = segments.make_session

    def note(proto, **options):
        ran.extend(node.output[0] for node in proto.graph.node)
        return original(proto, **options)

    monkeypatch.setattr(segments, "make_session", note)
    cuts = Cuts.of(prepare(graph.from_proto(chain())), ["s", "r", "b"])
    stream = Stream.of(cuts, batches())
    for tensor in cuts.places:
        values = list(stream.advance(tensor))
        assert [len(array) for array in values] == [4, 4, 4, 4, 4, 3]
        assert all(set(live) == cuts.alive(tensor) for live in stream.live), "what nobody reads later is let go"
    assert list(cuts.places) == ["b", "r", "s"]
    assert sorted(ran) == sorted(["a", "b", "c", "r", "t", "q", "k", "s"])


def test_tensors_that_a_body_reads_from_outside_are_carried_to_it() -> None:
    cuts = Cuts.of(prepare(graph.from_proto(branchy())), ["d", "b"])
    stream = Stream.of(cuts, batches())
    found = {tensor: list(stream.advance(tensor)) for tensor in cuts.places}
    wanted = [np.maximum(np.maximum(b["x"] @ weights()["w1"], 0) @ weights()["w2"], 0) for b in batches()]
    for got, array in zip(found["d"], wanted, strict=True):
        np.testing.assert_allclose(got, array, rtol=1e-4, atol=1e-3)


def test_replaced_weights_drop_what_only_the_old_ones_needed() -> None:
    cuts = Cuts.of(prepare(graph.from_proto(chain())), ["s"])
    names = {node.output[0]: node.name for node in cuts.nodes}
    stream = Stream.of(
        cuts, batches(), replaced=lambda node: {1: np.zeros((32, 16), np.float32)} if node == names["q"] else {}
    )
    proto = stream._proto(["s"], stream.live[0])
    assert "Transpose" not in [node.op_type for node in proto.graph.node]
    got, wanted = list(stream.advance("s")), run(chain(), batches()[0])
    assert got[0].shape[:2] == wanted[0].shape[:2]


def test_layers_that_read_one_tensor_share_its_statistics_and_weights_may_be_tied() -> None:
    tied = """g (float[N,T,16] x) => (float[N,T,16] y) { a = MatMul(x, w)  b = Relu(a)  y = MatMul(b, w) }"""
    proto = model(tied, w=normal(16, 16))
    work = prepare(graph.from_proto(proto))
    found = quantize_in_order(
        work, decide(work.graph, recipe(), None), Data(batches=[{"x": normal(8, 9, 16, seed=i)} for i in range(3)])
    )
    first, second = (np.asarray(qarray.q) for qarray in found.values())
    assert (first != second).any(), "each use is quantized for the input that it meets"


def test_no_statistics_are_collected_for_what_the_walk_sees_itself() -> None:
    chosen = recipe()
    assert (needed_detail(chosen), needed_detail(chosen, in_order=True)) == ("gram", "none")
    assert needs_statistics(chosen)
    assert not needs_statistics(chosen, in_order=True)
    assert needed_detail(recipe(sequential=False), in_order=True) == "gram"


def test_progress_counts_layers() -> None:
    work, told = prepare(graph.from_proto(chain())), []
    plan = decide(work.graph, recipe(), None)
    quantize_in_order(work, plan, Data(batches=batches(), progress=lambda done, total: told.append((done, total))))
    assert told == [(1, 5), (2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(("given", "match"), [([], "no samples"), ([{"z": np.zeros((1, 2, 32))}], "lacks an input")])
def test_data_that_does_not_fit_is_refused(given: list, match: str) -> None:
    work = prepare(graph.from_proto(chain()))
    with pytest.raises(DataError, match=match):
        quantize_in_order(work, decide(work.graph, recipe(), None), Data(batches=given))


def test_a_model_without_such_layers_is_quantized_as_usual() -> None:
    work = prepare(graph.from_proto(chain()))
    plan = decide(work.graph, make_recipe(scheme="w8"), None)
    assert len(quantize_in_order(work, plan, Data(batches=[]))) == 5


def test_auto_takes_gptq_where_inputs_are_known() -> None:
    def algorithms(**knows: bool) -> tuple:
        chosen = make_recipe(
            scheme="w4",
            layers=[{"match": "a*", "scheme": "w4", "weights": "uint4"}, {"match": "b*", "scheme": "w8"}],
        ).settled(**knows)
        parts = [chosen, *(entry.recipe() for entry in chosen.layers)]
        return tuple((part.weights.format, part.weights.method) for part in parts)

    assert algorithms(knows_inputs=True) == (("int4", "gptq"), ("uint4", "gptq"), ("int8", "rtn"))
    assert algorithms(knows_inputs=False) == (("int4", "rtn_mse"), ("uint4", "rtn_mse"), ("int8", "rtn"))


@pytest.mark.parametrize(("with_data", "algorithm"), [(True, "gptq"), (False, "rtn_mse")])
def test_w4_by_default_looks_at_data_if_there_is_some(with_data: bool, algorithm: str, tmp_path) -> None:
    onnx.save(chain(), tmp_path / "m.onnx")
    data = batches() if with_data else None
    result = quantize_file(tmp_path / "m.onnx", tmp_path / "q.onnx", make_recipe(scheme="w4"), data)
    assert {d.algorithm for d in result.plan.quantized()} == {algorithm}


def test_statistics_alone_are_those_of_the_float_model_and_that_is_said(tmp_path) -> None:
    onnx.save(chain(), tmp_path / "m.onnx")
    job = Job.open(tmp_path / "m.onnx")
    calibration = job.collect(batches(), detail="gram")
    result = job.quantize(make_recipe(scheme="w4"), calibration)
    assert {d.algorithm for d in result.plan.quantized()} == {"gptq"}
    assert any("the float model's layers" in note for note in result.notes)


def test_layers_inside_bodies_take_an_algorithm_that_looks_at_none(tmp_path) -> None:
    """Bodies do not run by themselves, so their inputs are not known behind the quantized layers."""
    text = BRANCHY.replace("e = Relu(c)", "e = MatMul(c, w6)")
    source = model(
        text, w6=normal(32, 32, seed=8), **{t.name: numpy_helper.to_array(t) for t in branchy().graph.initializer}
    )
    onnx.save(source, tmp_path / "m.onnx")
    done = quantize_file(tmp_path / "m.onnx", tmp_path / "q.onnx", make_recipe(scheme="w4"), batches())
    algorithms = {d.site.tensor: d.algorithm for d in done.plan.quantized() if d.site.role == "weight"}
    assert algorithms == {"w1": "gptq", "w2": "gptq", "w5": "gptq", "w6": "rtn_mse"}
