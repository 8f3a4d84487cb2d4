"""Every named scheme end to end on a small network, its lines, its options, and recipes that mix schemes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx.reference import ReferenceEvaluator
from qpipe.calibrate.errors import RecipeError
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.metrics import sqnr_db
from qpipe.calibrate.qarray import dequantize
from qpipe.pipeline.plan import spec_text
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.schemes import SCHEMES
from qpipe.pipeline.session import SessionExtras, make_session
from quantizing import Result, calibrate, model, normal, quantize, run

Array = np.ndarray[Any, Any]


def network() -> onnx.ModelProto:
    """A table, a product, a convolution and a Gemm: one of each kind of weight."""
    body = """g (int64[N] i, float[N,64] x) => (float[N,10] y) {
        e = Gather(t, i)
        h = Add(x, e)
        a = MatMul(h, w)
        r = Relu(a)
        p = Reshape(r, shape)
        c = Conv<pads=[1,1,1,1]>(p, k, kb)
        q = Relu(c)
        f = Flatten(q)
        y = Gemm<transB=1>(f, v, vb)
    }"""
    weights = {
        "t": normal(30, 64),
        "w": normal(64, 128) / 8,
        "k": normal(8, 2, 3, 3) / 4,
        "kb": normal(8, seed=3) / 4,
        "v": normal(10, 512) / 22,
        "vb": normal(10, seed=4),
        "shape": np.array([-1, 2, 8, 8]),
    }
    return model(body, **weights)


def batches(count: int = 4) -> list[dict[str, Array]]:
    rng = np.random.default_rng(7)
    return [{"i": rng.integers(0, 30, 16), "x": rng.normal(size=(16, 64)).astype(np.float32)} for _ in range(count)]


@pytest.fixture(scope="module")
def source() -> onnx.ModelProto:
    return network()


@pytest.fixture(scope="module")
def known(source: onnx.ModelProto) -> Any:
    return calibrate(source, batches())


def noise(found: Result, *, exact: bool = True) -> float:
    """Signal to noise against the float model, in dB."""
    batch = batches(5)[-1]
    return sqnr_db(run(found.source, batch)[0], run(found.proto, batch, exact=exact)[0])


def kernels(proto: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Operators after ONNX Runtime's optimizer."""
    path = folder / "optimized.onnx"
    make_session(proto, extras=SessionExtras(optimized_model=path))
    return Counter(node.op_type for node in onnx.load(path).graph.node)


EXPECTED: dict[str, tuple[int, float, dict[str, int]]] = {
    "w8a8": (21, 33, {"QLinearMatMul": 1, "QLinearConv": 1, "QGemm": 1}),
    "w8a8-dynamic": (21, 33, {"DynamicQuantizeMatMul": 2, "Conv": 1}),
    "w8a8-vector": (21, 33, {"OutlierMatMul": 1, "MatMul": 1, "Conv": 1}),  # 64 inputs are too few to gain
    "w8": (21, 38, {"MatMul": 1, "DequantizeLinear": 3}),
    "w4": (21, 14, {"MatMulNBits": 2, "DequantizeLinear": 1}),
    "w4-nf4": (21, 14, {"MatMulBnb4": 2, "Conv": 1}),
    "w8-global": (21, 30, {"DequantizeLinear": 3}),
    "w8a16": (21, 38, {"MatMul": 1, "Conv": 1}),
    "w16a16": (21, 70, {"MatMul": 1, "Conv": 1}),
    "fp8": (21, 25, {"DequantizeLinear": 3, "MatMul": 1}),
    "fp16": (21, 55, {"MatMul": 1}),
}
"""Per scheme: opset that is written, least dB in exact semantics, operators that ONNX Runtime runs."""


@pytest.mark.parametrize("scheme", EXPECTED)
def test_every_scheme_runs_on_onnxruntime(scheme: str, source: onnx.ModelProto, known: Any, tmp_path: Path) -> None:
    opset, least, expected = EXPECTED[scheme]
    found = quantize(source, calibration=known, scheme=scheme, target="ort-cpu-avx2")
    assert found.result.model.opset == opset
    assert found.result.model.metadata["qpipe.scheme"] == scheme
    assert noise(found) > least
    assert noise(found, exact=False) > min(least, 33) - 1
    got = kernels(found.proto, tmp_path)
    assert {op: got[op] for op in expected} == expected, got


@pytest.mark.parametrize(
    ("scheme", "opset"),
    [("w8a8", 13), ("w8a8-dynamic", 13), ("w8", 13), ("w4-nf4", 13), ("w8a16", 21), ("fp8", 19), ("fp16", 13)],
)
def test_the_opset_is_raised_to_what_the_numbers_need_and_no_further(scheme: str, opset: int) -> None:
    old = model("g (float[N,64] x) => (float[N,8] y) { y = MatMul(x, w) }", opset=13, ir=7, w=normal(64, 8))
    found = quantize(old, scheme=scheme, calibration=calibrate(old, [{"x": normal(4, 64)}]))
    assert found.result.model.opset == opset


def test_bits_order_the_error(source: onnx.ModelProto, known: Any) -> None:
    names = ("w4", "w8-global", "w8", "w16a16")
    found = [noise(quantize(source, calibration=known, scheme=name, target="portable")) for name in names]
    assert found == sorted(found)


@pytest.mark.parametrize("scheme", ["w8", "w4", "w8-global", "w16a16", "fp8"])
def test_stored_weights_are_the_values_that_the_plan_says(scheme: str, source: onnx.ModelProto, known: Any) -> None:
    """Weights as stored mean what the quantizer of numpy makes of the float ones, within half of a step."""
    found = quantize(source, calibration=known, scheme=scheme, target="portable")
    held = {"w": normal(64, 128) / 8, "v": normal(10, 512) / 22}
    checked = 0
    for site, qarray in found.result.weights.items():
        if site.tensor in held and qarray.params.spec.format.is_integer:
            granularity = qarray.params.spec.granularity
            step = np.broadcast_to(granularity.spread(qarray.params.scale, held[site.tensor].shape), qarray.q.shape)
            error = np.abs(dequantize(qarray) - held[site.tensor])
            limit = 0.501 * step if scheme != "w4" else 3.5 * step  # the search of w4 may clip
            assert (error <= limit).all()
            checked += 1
    assert checked == (0 if scheme == "fp8" else 2)


def test_one_scale_for_the_whole_model(source: onnx.ModelProto, known: Any) -> None:
    found = quantize(source, calibration=known, scheme="w8-global")
    scales = {float(q.params.scale) for q in found.result.weights.values()}
    assert len(found.result.weights) == 3
    largest = max(float(np.abs(a).max()) for a in (normal(64, 128) / 8, normal(8, 2, 3, 3) / 4, normal(10, 512) / 22))
    assert scales == {float(np.float32(largest / 127))}
    algorithms = {d.algorithm for d in found.plan.quantized()}
    assert algorithms == {f"fixed:{largest!r}"}


def test_float8_activations_are_refused_where_the_runtime_refuses_them(source: onnx.ModelProto, known: Any) -> None:
    found = quantize(source, calibration=known, scheme="fp8", target="ort-cpu")
    refused = [d for d in found.plan.decisions if d.site.role == "activation"]
    assert {d.spec for d in refused} == {None}
    assert "does not run float8_e4m3fn activations: its optimizer fuses" in refused[0].reason
    full = quantize(source, calibration=known, scheme="fp8", target="tensorrt")
    assert full.ops()["QuantizeLinear"] == 3
    assert noise(full) > 25


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_explain_prints_lines_that_are_the_recipe(name: str) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "qpipe", "explain", "scheme", name], capture_output=True, text=True, check=True
    ).stdout
    lines = [line for line in shown.splitlines() if not line.startswith("#")]
    assert len(lines) <= 9
    assert make_recipe(**yaml.safe_load("\n".join(lines))) == make_recipe(scheme=name)
    assert "# In float:" in shown


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("nf4", "w4-nf4"),
        ("LLM_int8", "w8a8-outlier"),
        ("eetq", "w8"),
        ("int4", "w4"),
        ("float16", "fp16"),
        ("w8a9", "w8a8"),
    ],
)
def test_names_of_other_tools_lead_to_the_scheme(name: str, scheme: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(scheme=name)
    assert scheme in str(caught.value.expected).split(" or ")


def test_no_two_schemes_are_known_by_one_name() -> None:
    known = [name for scheme in SCHEMES.values() for name in scheme.known_as]
    assert len(set(known)) == len(known)
    assert not set(known) & set(SCHEMES)


def test_vector_wise_scales_are_one_per_row_and_column() -> None:
    """X s_x [tokens, 1] and W s_w [1, out], both of the largest magnitude over 127; no statistics are asked for."""
    w = normal(64, 16) * np.exp(normal(16))
    plain = model("g (float[N,64] x) => (float[N,16] y) { y = MatMul(x, w) }", w=w.astype(np.float32))
    found = quantize(plain, scheme="w8a8-vector", outliers={"cap": 0, "headroom": 0.0, "min_inputs": 64})
    assert found.ops() == {"OutlierMatMul": 1}
    x = (normal(6, 64, seed=1) * np.exp(3 * normal(6, 1, seed=2))).astype(np.float32)
    s_x, s_w = np.abs(x).max(1, keepdims=True) / 127, np.abs(w).max(0, keepdims=True) / 127
    expected = (np.rint(x / s_x) @ np.rint(w / s_w)) * s_x * s_w
    per_row = np.abs(run(found.proto, {"x": x})[0] - expected).max(1) / np.abs(expected).max(1)
    assert per_row.max() < 2e-3
    tensor = quantize(plain, scheme="w8a8-dynamic", target="portable")
    signal, (exact,) = x @ w, run(tensor.proto, {"x": x})
    quiet = np.argmin(np.abs(x).max(1))  # a row that one scale for the tensor leaves no codes for
    assert sqnr_db(signal[quiet], run(found.proto, {"x": x})[0][quiet]) > sqnr_db(signal[quiet], exact[quiet]) + 10


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"weights": {"symmetric": False, "format": "uint8"}}, "uint8 per channel (axis 1), asymmetric"),
    ({"weights": {"reduce_bits": 1}}, "int8 per channel (axis 1), symmetric, 7 bits"),
    ({"weights": {"granularity": "tensor"}}, "int8 per tensor, symmetric"),
    (
        {"weights": {"format": "int4", "granularity": "block", "block_size": 16}},
        "int4 blocks of 16 (axis 0), asymmetric",
    ),
    ({"weights": "int16"}, "int16 per channel (axis 1), symmetric"),
    ({"weights": "mxfp4"}, "mxfp4 blocks of 32 (axis 0), symmetric"),
    ({"weights": "mxfp8_e4m3"}, "mxfp8_e4m3 blocks of 32 (axis 0), symmetric"),
    ({"weights": "nvfp4"}, "nvfp4 blocks of 16 (axis 0), symmetric"),
]


@pytest.mark.parametrize(("options", "expected"), OPTIONS)
def test_options_of_weights(options: dict[str, Any], expected: str) -> None:
    plain = model("g (float[N,64] x) => (float[N,8] y) { y = MatMul(x, w) }", opset=17, ir=8, w=normal(64, 8))
    found = quantize(plain, **{"scheme": "w8", "target": "portable", **options})
    texts = [spec_text(d.spec) for d in found.sites("MatMul_0") if d.spec and d.site.role == "weight"]
    assert texts == [expected]
    if "fp4" not in expected:  # ONNX Runtime has no kernel of float4: the file is valid, and that is all
        (qarray,) = found.result.weights.values()
        x = normal(3, 64, seed=5)
        np.testing.assert_allclose(run(found.proto, {"x": x})[0], x @ dequantize(qarray), atol=1e-4)


BLOCK_FORMATS = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "nvfp4")


@pytest.mark.parametrize("algorithm", ["rtn", "rtn_mse"])
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_scales_of_blocks_are_stored_as_the_target_takes_them(name: str, algorithm: str) -> None:
    """In 8 bits, or as float32 of the same value; both mean what the quantizer of numpy says."""
    plain = model("g (float[N,64] x) => (float[N,8] y) { y = MatMul(x, w) }", opset=17, ir=8, w=normal(64, 8))
    options, x = {"format": name, "algorithm": algorithm}, normal(3, 64, seed=5)
    narrow = quantize(plain, scheme="w8", target="openvino", weights=options)
    wide = quantize(plain, scheme="w8", target="portable", weights=options)
    kinds = [{onnx.TensorProto.DataType.Name(t.data_type) for t in f.proto.graph.initializer} for f in (narrow, wide)]
    element = FORMATS.get(name).onnx_type
    assert kinds[0] == ({element, "FLOAT8E4M3FN", "FLOAT"} if name == "nvfp4" else {element, "FLOAT8E8M0"})
    assert kinds[1] == {element, "FLOAT"}
    opsets = (23, 23) if name == "nvfp4" else (24, 23 if name == "mxfp4" else 21)
    assert (narrow.result.model.opset, wide.result.model.opset) == opsets
    assert narrow.ops()["DequantizeLinear"] == (2 if name == "nvfp4" else 1)
    for found in (narrow, wide):
        (qarray,) = found.result.weights.values()
        got = ReferenceEvaluator(found.proto).run(None, {"x": x})[0]
        np.testing.assert_allclose(got, x @ dequantize(qarray), atol=1e-5)


@pytest.mark.parametrize(
    ("part", "name", "words"),
    [
        ("weights", "float16", "cast to"),
        ("weights", "float8_e8m0", "a type of scales"),
        ("activations", "nf4", "codes of stored weights"),
        ("activations", "mxfp8_e4m3", "blocks of stored weights"),
        ("activations", "int3", "no number format"),
    ],
)
def test_formats_that_a_part_cannot_be_stored_in(part: str, name: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe(scheme="w8a8", **{part: name})


def test_a_codebook_brings_its_blocks_along() -> None:
    plain = model("g (float[N,64] x) => (float[N,8] y) { y = MatMul(x, w) }", w=normal(64, 8))
    found = quantize(plain, scheme="w8", weights="nf4")
    (qarray,) = found.result.weights.values()
    x = normal(3, 64, seed=5)
    assert qarray.params.spec.granularity.block_size == 32
    np.testing.assert_allclose(run(found.proto, {"x": x})[0], x @ dequantize(qarray), atol=1e-5)


def test_narrow_range_and_bits_of_each_side(source: onnx.ModelProto, known: Any) -> None:
    wide = quantize(source, calibration=known, scheme="w8", weights={"narrow_range": False})
    assert {q.params.spec.qmin for q in wide.result.weights.values()} == {-128}
    narrow = quantize(source, calibration=known, scheme="w8")
    assert {q.params.spec.qmin for q in narrow.result.weights.values()} == {-127}
    options = {"format": "int8", "symmetric": True, "narrow_range": True, "reduce_bits": 1}
    found = quantize(source, calibration=known, scheme="w8a8", activations=options, target="portable")
    assert {(s.params.spec.qmin, s.params.spec.qmax) for s in found.result.activations.values()} == {(-63, 63)}
    assert {q.params.spec.pair_limit for q in found.result.weights.values()} == {0}


def test_schemes_are_mixed_by_pattern(source: onnx.ModelProto, known: Any, tmp_path: Path) -> None:
    text = """
    scheme: w8a8
    target: ort-cpu
    layers:
      - {match: "op:Gemm", scheme: w4}
      - {match: "MatMul_*", scheme: w8a8-dynamic, weights: {reduce_bits: 1}}
      - {match: "re:^Gather", scheme: w8, weights: {embeddings: true}}
    """
    found = quantize(source, calibration=known, **yaml.safe_load(text))
    forms = {name: d.form for name, d in found.plan.nodes().items() if d.spec is not None}
    assert forms["MatMul_2"] == "dynamic"
    assert forms["Conv_5"] == "qdq"
    assert forms["Gemm_8"] == "nbits"
    assert forms["Gather_0"] == "lookup"
    assert {d.spec.reduce_bits for d in found.sites("MatMul_2") if d.site.role == "weight" and d.spec} == {1}
    assert noise(found) > 12
    assert kernels(found.proto, tmp_path)["DynamicQuantizeMatMul"] == 1


def test_flags_amount_to_the_same_recipe(tmp_path: Path, source: onnx.ModelProto) -> None:
    path, recipe = tmp_path / "m.onnx", tmp_path / "r.yaml"
    onnx.save(source, path)
    flags = ["--scheme", "w8", "--weights", "int4", "--block", "64", "--float-type", "float16"]
    more = ["--set", "weights.symmetric=true", "--activations", "none", "--save-recipe", str(recipe)]
    command = [sys.executable, "-m", "qpipe", "quantize", str(path), "--dry-run", "--json", *flags, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    saved = make_recipe(**yaml.safe_load(recipe.read_text()))
    weights = {"format": "int4", "granularity": "block", "block_size": 64, "symmetric": True}
    assert saved == make_recipe(scheme="w8", weights=weights, float_type="float16", activations=None)
    plan = json.loads(done.stdout)["plan"]
    assert plan["recipe_hash"] == saved.digest()


def test_names_of_formats_stand_for_options() -> None:
    short = make_recipe(scheme="w8a8", weights="int4", activations="int16")
    assert short == make_recipe(scheme="w8a8", weights={"format": "int4"}, activations={"format": "int16"})
    assert make_recipe(scheme="w8a8", activations="none").activations is None


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"scheme": "w8a9"}, "no scheme is called"),
        ({"layers": [{"match": "*", "scheme": "w9"}]}, "no scheme is called"),
        ({"layers": [{"match": "*", "scheme": "w8", "weights": {"formt": "int8"}}]}, "unknown key"),
        ({"scheme": "w8", "weights": {"granularity": "row"}}, "wrong value"),
    ],
)
def test_what_no_recipe_can_be(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe(**keys)


def test_every_format_of_a_scheme_exists() -> None:
    for scheme in SCHEMES.values():
        for part in ("weights", "activations"):
            options = scheme.keys.get(part) or {}
            assert options.get("format", "int8") in FORMATS
