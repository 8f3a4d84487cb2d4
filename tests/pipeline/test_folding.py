"""Folding a scale per channel into what makes a tensor: through attention into the values, and into RMSNorm."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from qpipe.pipeline import graph
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.stages.collect import CollectOptions, collect
from qpipe.pipeline.stages.decide import decide, wanted_tensors
from qpipe.pipeline.stages.details import wanted_details
from qpipe.pipeline.stages.equalize import Equalized, equalize, kept_of
from qpipe.pipeline.stages.prepare import prepare
from qpipe.pipeline.targets import TARGETS
from qpipe.pipeline.workflow import quantize_file
from quantizing import model, normal, run

LOUD = [2, 11, 29]
HEADS = np.array([0, 0, 4, 8])
"""Shape of 32 channels as 4 heads of 8."""
SEPARATE = """
    q0 = MatMul(x, wq)  q1 = Reshape(q0, heads)  q = Transpose<perm=[0,2,1,3]>(q1)
    k0 = MatMul(x, wk)  k1 = Reshape(k0, heads)  k = Transpose<perm=[0,2,3,1]>(k1)
    v0 = MatMul(x, wv)  v1 = Add(v0, bv)  v2 = Reshape(v1, heads)  v = Transpose<perm=[0,2,1,3]>(v2)
"""
FUSED = """
    f0 = MatMul(x, wf)  f = Add(f0, bf)  qs, ks, vs = Split<axis=-1, num_outputs=3>(f)
    q1 = Reshape(qs, heads)  q = Transpose<perm=[0,2,1,3]>(q1)
    k1 = Reshape(ks, heads)  k = Transpose<perm=[0,2,3,1]>(k1)
    v1 = Reshape(vs, heads)  v = Transpose<perm=[0,2,1,3]>(v1)
"""
GROUPED = """
    q0 = MatMul(x, wq)  q1 = Reshape(q0, heads)  q = Transpose<perm=[0,2,1,3]>(q1)
    k0 = MatMul(x, wk)  k1 = Reshape(k0, heads)  k = Transpose<perm=[0,2,3,1]>(k1)
    v0 = MatMul(x, wg)  v1 = Reshape(v0, pairs)  v2 = Transpose<perm=[0,2,1,3]>(v1)
    v3 = Unsqueeze(v2, two)  v4 = Expand(v3, repeats)  v = Reshape(v4, joined)
"""
ATTENTION = """g (float[2,6,32] x) => (float[2,6,24] y) {{ {values}
    s0 = MatMul(q, k)  s = Softmax<axis=-1>(s0)  a = MatMul(s, v)
    b = Transpose<perm=[0,2,1,3]>(a)  c = Reshape(b, flat)  y = MatMul(c, wo) }}"""


def attention(values: str, body: str = ATTENTION) -> onnx.ModelProto:
    wv, bv = normal(32, 32, seed=5), normal(32, seed=6)
    wv[:, LOUD], bv[LOUD] = 40 * wv[:, LOUD], 30
    constants = {
        "wq": normal(32, 32) / 6,
        "wk": normal(32, 32, seed=1) / 6,
        "wv": wv,
        "bv": bv,
        "wg": wv[:, :16].copy(),
        "wf": np.concatenate([normal(32, 64) / 6, wv], axis=1),
        "bf": np.concatenate([normal(64), bv]),
        "wo": normal(32, 24, seed=8),
        "heads": HEADS,
        "flat": np.array([0, 0, 32]),
        "pairs": np.array([0, 0, 2, 8]),
        "two": np.array([2]),
        "repeats": np.array([2, 2, 2, 6, 8]),
        "joined": np.array([2, 4, 6, 8]),
    }
    text = body.format(values=values)
    words = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return model(text, **{name: array for name, array in constants.items() if name in words})


def batches(channels: int = 32) -> list[dict[str, np.ndarray]]:
    return [{"x": normal(2, 6, channels, seed=i)} for i in range(24)]


def equalized(proto: onnx.ModelProto, **keys: object) -> tuple[onnx.ModelProto, list[Equalized]]:
    """The model after equalizing, whose float function has stayed, and what was done."""
    recipe, work = make_recipe(**{"target": "ort-cpu-vnni", **keys}), prepare(graph.from_proto(proto))
    options = CollectOptions(details=wanted_details(work.graph, "gram"))
    known = collect(proto, wanted_tensors(work.graph), batches(), options)
    done, _ = equalize(work.graph, decide(work.graph, recipe, known), recipe, known)
    changed = graph.to_proto(work)
    onnx.checker.check_model(changed, full_check=True)
    for wanted, got in zip(run(proto, batches()[0]), run(changed, batches()[0]), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    return changed, done


def entry_of(done: list[Equalized], tensor: str) -> Equalized:
    return next(entry for entry in done if entry.tensor == tensor)


@pytest.mark.parametrize(
    "keys", [{"equalize": "smoothquant:0.8"}, {"equalize": "auto"}, {"scheme": "w4", "equalize": "awq"}]
)
@pytest.mark.parametrize("values", [SEPARATE, FUSED], ids=["separate", "fused"])
def test_a_scale_moves_through_attention_into_the_values(values: str, keys: dict[str, str]) -> None:
    proto = attention(values)
    changed, done = equalized(proto, **keys)
    assert entry_of(done, "c").folded
    assert entry_of(done, "c").spread > 2
    muls = [node.name for node in changed.graph.node if node.op_type == "Mul"]
    assert muls == [name for name in kept_of(done) if name in muls]
    assert not any("c_" in name for name in muls)


def test_the_quantized_model_gains_by_folding_through_attention(tmp_path) -> None:
    proto = attention(SEPARATE)
    onnx.save(proto, tmp_path / "m.onnx")
    errors = {}
    for how in ("none", "smoothquant"):
        recipe = make_recipe(scheme="w8a8", target="ort-cpu-vnni", method="minmax", equalize=how)
        quantize_file(tmp_path / "m.onnx", tmp_path / "q.onnx", recipe, batches(), force=True)
        wanted, got = (run(m, batches()[0])[0] for m in (proto, onnx.load(tmp_path / "q.onnx")))
        errors[how] = float(np.square(wanted - got).mean())
    assert errors["smoothquant"] < errors["none"] / 2


def test_values_that_several_heads_share_are_not_divided() -> None:
    """One scale per value channel cannot serve two query heads that ask for different ones."""
    changed, done = equalized(attention(GROUPED), equalize="smoothquant:0.8")
    assert not entry_of(done, "c").folded
    assert any(node.op_type == "Mul" for node in changed.graph.node)


@pytest.mark.parametrize("output", ["v", "v2", "a"])
def test_values_that_are_outputs_stay(output: str) -> None:
    shapes = {"v": "2,4,6,8", "v2": "2,6,4,8", "a": "2,4,6,8"}
    body = ATTENTION.replace("=> (", f"=> (float[{shapes[output]}] {output}, ")
    _, done = equalized(attention(SEPARATE, body), equalize="smoothquant:0.8")
    assert not entry_of(done, "c").folded


def test_values_that_are_quantized_in_the_product_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of the values are of the tensor as a whole: divided per channel, they would be void."""
    target = dataclasses.replace(TARGETS.get("portable"), name="attentive", static_attention=True)
    monkeypatch.setitem(TARGETS._items, "attentive", target)
    _, done = equalized(attention(SEPARATE), equalize="smoothquant:0.8", target="attentive")
    assert not entry_of(done, "c").folded


def test_auto_puts_no_mul_where_it_does_not_halve_the_error() -> None:
    """Scales of even channels gain little: behind a Sigmoid, which nothing folds into, they are not worth a Mul."""
    body = "g (float[2,6,32] x) => (float[2,6,24] y) { h = MatMul(x, wq)  s = Sigmoid(h)  y = MatMul(s, wo) }"
    proto = model(body, wq=normal(32, 32), wo=normal(32, 24))
    changed, _ = equalized(proto, equalize="auto")
    assert not [node.name for node in changed.graph.node if node.op_type == "Mul" and "s" in node.input]


NORMS = {
    "Pow, ReduceMean, Sqrt, Div": """p = Pow(x, two)  m = ReduceMean<keepdims=1>(p, last)  e = Add(m, eps)
        r = Sqrt(e)  d = Div(x, r)  n = Mul(d, gain)""",
    "gain first, reciprocal root": """p = Mul(x, x)  m = ReduceMean<keepdims=1>(p, last)  e = Add(m, eps)
        r = Sqrt(e)  i = Reciprocal(r)  d = Mul(x, i)  n = Mul(gain, d)""",
    "RMSNormalization": "n = RMSNormalization<axis=-1>(x, gain)",
}


@pytest.mark.parametrize("how", NORMS)
def test_a_scale_folds_into_the_gain_of_an_rmsnorm(how: str) -> None:
    gain = np.ones(32, np.float32)
    gain[LOUD] = 40.0
    known = {"two": np.float32(2), "eps": np.float32(1e-6), "last": np.array([-1]), "gain": gain}
    used = {
        name: np.asarray(array) for name, array in known.items() if f"{name})" in NORMS[how] or f"({name}" in NORMS[how]
    }
    body = f"g (float[N,T,32] x) => (float[N,T,24] y) {{ {NORMS[how]}  y = MatMul(n, wo) }}"
    proto = model(body, opset=23, ir=11, wo=normal(32, 24), **used)
    before = [node.op_type for node in graph.to_proto(prepare(graph.from_proto(proto))).graph.node]
    changed, done = equalized(proto, equalize="smoothquant:0.8")
    assert entry_of(done, "n").folded
    assert [node.op_type for node in changed.graph.node] == before
