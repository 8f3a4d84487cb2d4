"""Models of every kind through the command line: what comes out, with which exit code, and what is said."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import custom_op
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser
from quantizing import model, normal, random_batches, signature
from quantizing import run as outputs

from .conftest import Done, Run

FUNCTIONS = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
g (float[N,4] x) => (float[N,4] y) { h = MatMul(x, w)  y = my.Layer(h, v) }
<domain: "my", opset_import: ["" : 17]> Layer (a, k) => (b) { m = MatMul(a, k)  b = Tanh(m) }"""
PRODUCTS = "g (float[N,4] x) => (float[N,4] y) { h = MatMul(x, w)  y = MatMul(h, v) }"
AROUND = "g (float[N,4] x) => (float[N,4] y) { h = MatMul(x, w)  t = cust.Twice(h)  y = MatMul(t, v) }"


def weights(**more: Any) -> dict[str, Any]:
    return {"w": normal(4, 4) / 2, "v": normal(4, 4, seed=1) / 2, **more}


def with_functions() -> onnx.ModelProto:
    proto = parser.parse_model(FUNCTIONS)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights().items())
    return proto


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> Any:
    """Save a model, calibrate and quantize it; return what the second command gave, and the model that came out."""
    monkeypatch.chdir(tmp_path)

    def call(proto: onnx.ModelProto, *flags: object, data: dict[str, Any] | None = None) -> tuple[Done, Any]:
        onnx.save(proto, "m.onnx")
        np.savez("data.npz", **(random_batches(proto, 1)[0] if data is None else data))
        done = run("quantize", "m.onnx", "--data", "data.npz", "-o", "q.onnx", "--force", "--json", *flags)
        return done, onnx.load("q.onnx") if Path("q.onnx").exists() else None

    return call


def ops(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def stored(done: Done) -> dict[str, str]:
    """Reason by node, of those that stayed in float."""
    entries = json.loads(done.out)["plan"]["decisions"]
    return {e["node"]: e["reason"] for e in entries if e["role"] == "node"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(job: Any, value: float) -> None:
    bad = normal(4, 4)
    bad[1, 2] = value
    data = {"x": np.zeros((1, 4), np.float32)}
    done, out = job(model(PRODUCTS, **weights(v=bad)), "--calib-by-name", data=data)
    assert out is None
    assert done.code in (3, 4)  # what such a weight makes of the activations may be refused first
    done, out = job(model(PRODUCTS, **weights(v=bad)), "--scheme", "w8")
    assert (done.code, out) == (3, None)
    assert "initializer 'v'" in done.err
    assert "1 of 16 values" in done.err
    done, out = job(model(PRODUCTS, **weights(v=bad)), "--scheme", "w8", "--skip-nonfinite")
    assert done.code == 0
    assert ops(out).count("DequantizeLinear") == 1


def test_constants_and_inputs_that_are_outputs(job: Any) -> None:
    text = "g (float[N,4] x) => (float[N,4] y, float[4,4] w, float[N,4] x2) { y = MatMul(x, w)  x2 = Identity(x) }"
    source = model(text, w=weights()["w"])
    done, out = job(source)
    assert done.code == 0
    assert signature(out) == signature(source)
    batch = random_batches(source, 1)[0]
    for wanted, got in list(zip(outputs(source, batch), outputs(out, batch), strict=True))[1:]:
        np.testing.assert_array_equal(wanted, got)


def test_one_weight_in_two_layouts_and_in_a_float_user(job: Any) -> None:
    text = """g (float[N,4] x) => (float[N,4] y, float[N,4] z) {
        a = MatMul(x, w)  t = Transpose<perm=[1,0]>(w)  b = MatMul(x, t)  c = Add(a, b)  n = Sin(w)  y = Add(c, n)
        z = MatMul(c, w)
    }"""
    source = model(text.replace("[N,4]", "[4,4]"), w=weights()["w"])
    done, out = job(source)
    assert done.code == 0
    held = {t.name: t for t in out.graph.initializer}
    codes = [t for t in held.values() if t.data_type == onnx.TensorProto.INT8 and list(t.dims) == [4, 4]]
    assert len(codes) == 2
    assert "w" in held, "Sin reads the float weight still"
    batch = random_batches(source, 1)[0]
    for wanted, got in zip(outputs(source, batch), outputs(out, batch), strict=True):
        assert np.abs(wanted - got).max() < 0.05 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["", "same", "a/b c", "größe 重み", "\x1b]0;t\x07", "../../x", "n" * 10_000])
def test_names_of_nodes(job: Any, run: Run, name: str) -> None:
    source = model(PRODUCTS, **weights())
    for node in source.graph.node:
        node.name = name
    done, out = job(source)
    assert done.code == 0
    names = [node.name for node in out.graph.node if node.op_type == "MatMul"]
    assert names[0] == name
    assert names[1] == (f"{name}_0" if name else ""), "ONNX Runtime refuses two nodes of one name"
    assert run("validate", "m.onnx", "q.onnx", "--data", "data.npz", "--rounds", "0").code == 0
    assert "\x1b" not in done.err
    assert sorted(p.name for p in Path().iterdir()) == ["data.npz", "m.onnx", "q.onnx"]


def test_names_that_qpipe_would_give(job: Any) -> None:
    text = """g (float[N,4] x) => (float[N,4] y, float w_scale_out) {
        x_scale = Identity(x)  w_quantized = Add(x_scale, x)  y = MatMul(x, w)  w_scale_out = Identity(w_scale)
        w_DequantizeLinear_Output = Neg(w_quantized)
    }"""
    source = model(text, w=weights()["w"], w_scale=np.float32(7))
    done, out = job(source)
    assert done.code == 0
    names = [t.name for t in out.graph.initializer] + [n for node in out.graph.node for n in node.output]
    assert len(names) == len(set(names))
    assert outputs(out, random_batches(source, 1)[0])[1] == 7


def too_new(body: str, **extra: Any) -> onnx.ModelProto:
    newest = onnx.defs.onnx_opset_version()
    if newest <= 26:
        pytest.skip("this onnx knows no opset that runtimes do not")
    text = PRODUCTS.replace("h = MatMul(x, w)", body)
    return model(text, opset=newest, ir=int(onnx.IR_VERSION), **weights(**extra))


def test_an_opset_beyond_the_runtime_is_lowered(job: Any, run: Run) -> None:
    done, out = job(too_new("g = MatMul(x, w)  h = Cast<to=1>(g)"))
    assert done.code == 0, done.err
    assert out.opset_import[0].version == 25
    assert out.ir_version <= 13
    assert run("check", "q.onnx", "--target", "ort-cpu").code == 0
    assert run("validate", "m.onnx", "q.onnx", "--data", "data.npz", "--min-cosine", "0.99").code == 0


def test_an_opset_that_stays_beyond_the_runtime_is_said(job: Any, run: Run) -> None:
    done, out = job(
        too_new(
            "g = MatMul(x, w)  g3 = Unsqueeze(g, a)  h3, s = CausalConvWithState(g3, k)  h = Squeeze(h3, a)",
            k=normal(4, 1, 2),
            a=np.array([2]),
        ),
        "--scheme",
        "w8",
    )
    assert done.code == 0, done.err
    newest = onnx.defs.onnx_opset_version()
    assert out.opset_import[0].version == newest
    assert f"opset {newest} stays" in done.err
    checked = run("check", "q.onnx", "--target", "ort-cpu")
    assert "opset-ceiling" in checked.out
    validated = run("validate", "m.onnx", "q.onnx", "--data", "data.npz")
    assert validated.code == 3
    assert "does not know the model's" in validated.err


IF = """g (float[2,4] x, bool f) => (float[2,4] y) {
    h = MatMul(x, w)
    y = If(f)<then_branch = t () => (float[2,4] a) { k = MatMul(h, v)  a = Relu(k) },
              else_branch = e () => (float[2,4] b) { b = MatMul(x, v) }>
}"""


@pytest.mark.parametrize("seen", [(True, False), (True,), (False,)])
def test_branches_are_quantized_where_calibration_saw_them(job: Any, tmp_path: Path, seen: Any) -> None:
    (tmp_path / "batches.py").write_text(
        "import numpy as np\n"
        "def load_data():\n"
        f"    for flag in {seen}:\n"
        "        yield {'x': np.random.default_rng(0).normal(size=(2, 4)).astype('f'), 'f': np.array(flag)}\n"
    )
    done, out = job(model(IF, **weights()), "--data", "batches.py")
    assert done.code == 0, done.err
    bodies = {a.name: [n.op_type for n in a.g.node] for n in out.graph.node for a in n.attribute if a.g.node}
    quantized = {name.startswith("then") for name, types in bodies.items() if "QuantizeLinear" in types}
    assert quantized == set(seen)
    kept = [reason for reason in stored(done).values() if reason.startswith("inside If")]
    assert sum("did not run" in reason for reason in kept) == 2 - len(seen)
    for flag in (True, False):
        batch = {"x": np.random.default_rng(0).normal(size=(2, 4)).astype("f"), "f": np.array(flag)}
        wanted, got = outputs(model(IF, **weights()), batch)[0], outputs(out, batch)[0]
        assert np.abs(wanted - got).max() < 0.05 * np.abs(wanted).max()


def test_functions_are_kept_unless_inlined(job: Any) -> None:
    source = with_functions()
    done, out = job(source)
    assert done.code == 0, done.err
    assert [f.name for f in out.functions] == ["Layer"]
    assert ops(out).count("MatMul") == 1
    assert stored(done)["my::Layer/MatMul_0"].startswith("kept: inside the model-local function Layer (--inline")
    done, out = job(source, "--inline")
    assert done.code == 0, done.err
    assert not out.functions
    assert ops(out).count("MatMul") == 2
    assert ops(out).count("DequantizeLinear") == 4
    batch = random_batches(source, 1)[0]
    assert np.abs(outputs(source, batch)[0] - outputs(out, batch)[0]).max() < 0.05


def test_statistics_of_the_inlined_model(job: Any, run: Run) -> None:
    job(with_functions())
    assert run("calibrate", "m.onnx", "--data", "data.npz", "-o", "m.qcal", "--inline").code == 0
    done = run("quantize", "m.onnx", "--calib", "m.qcal", "-o", "i.onnx", "--inline")
    assert done.code == 0, done.err
    assert ops(onnx.load("i.onnx")).count("DequantizeLinear") == 4


def test_an_operator_of_an_unknown_domain(job: Any, run: Run, tmp_path: Path) -> None:
    source = model(AROUND, domains='"cust" : 1', **weights())
    done, out = job(source)
    assert (done.code, out) == (5, None)
    assert "operator cust::Twice needs a library" in done.err
    assert "--custom-op-library" in done.err
    done, out = job(source, "--scheme", "w8")
    assert done.code == 0
    assert ops(out).count("DequantizeLinear") == 2
    library = custom_op.build(tmp_path)
    done, out = job(source, "--custom-op-library", library)
    assert done.code == 0, done.err
    assert ops(out) == [*["QuantizeLinear", "DequantizeLinear"] * 1, "DequantizeLinear", "MatMul", "Twice"] or (
        ops(out).count("QuantizeLinear") == 2 and "Twice" in ops(out)
    )
    flags = ("--data", "data.npz", "--custom-op-library", library)
    assert run("calibrate", "m.onnx", *flags, "-o", "m.qcal").code == 0
    assert run("validate", "m.onnx", "q.onnx", *flags, "--min-cosine", "0.99").code == 0
    assert run("quantize", "m.onnx", "--calib", "m.qcal", "-o", "c.onnx").code == 0, "statistics need no library"


def test_a_library_that_does_not_load(job: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.so").write_bytes(b"not a library")
    done, out = job(model(AROUND, domains='"cust" : 1', **weights()), "--custom-op-library", tmp_path / "bad.so")
    assert (done.code, out) == (5, None)
    assert "the custom-op library does not load" in done.err


@pytest.mark.parametrize("large", [False, True])
def test_sparse_weights(job: Any, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    source = model("g (float[N,4] x) => (float[N,4] y) { h = MatMul(x, s)  y = MatMul(h, v) }", v=weights()["v"])
    places = np.array([1, 7, 10], np.int64)
    values = numpy_helper.from_array(np.float32([1.5, -2, 0.5]), "s")
    tensor = helper.make_sparse_tensor(values, numpy_helper.from_array(places, "s_indices"), [4, 4])
    source.graph.sparse_initializer.append(tensor)
    monkeypatch.setattr(sys.modules["qpipe.pipeline.passes.densify_sparse"], "LARGEST", 16 if large else 2**20)
    done, out = job(source)
    assert done.code == 0, done.err
    assert len(out.graph.sparse_initializer) == large
    assert ops(out).count("QuantizeLinear") == 2 - large
    if large:
        assert "stored sparse" in stored(done)["MatMul_0"]


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_nothing_to_quantize_is_said_loudly(job: Any, flags: Any) -> None:
    source = model("g (int64[N,4] x) => (int64[N,4] y) { y = Add(x, x) }")
    done, out = job(source, *flags)
    assert done.code == 0, done.err
    assert "nothing was quantized" in done.err
    assert (out is None) == bool(flags)
    Path("q.onnx").unlink(missing_ok=True)
    done, out = job(source, "--require-quantized", *flags)
    assert (done.code, out) == (1, None)
    assert "nothing was quantized" in done.err
    assert "no integer" in done.err or "not float" in done.err


def test_strings_sequences_and_optionals_stay(job: Any) -> None:
    body = """g (float[2,4] x, string[2] t, int64[3] n) => (float[2,4] y, string[2] u, seq(float[2,4]) s, bool b) {
        h = MatMul(x, w)  s = SequenceConstruct(h, x)  i = SequenceAt(s, zero)  y = MatMul(i, v)  u = Identity(t)
        o = Optional(h)  b = OptionalHasElement(o)
    }"""
    source = model(body, **weights(zero=np.array(0)))
    data = {"x": normal(2, 4), "t": np.array(["a", "b"]), "n": np.arange(3)}
    done, out = job(source, "--batch", "2", data={"x": data["x"][None][0], "t": data["t"], "n": data["n"]})
    assert done.code in (0, 4)
    Path("load.py").write_text(
        "import numpy as np\n"
        "def load_data():\n"
        "    x = np.random.default_rng(0).normal(size=(2, 4)).astype('f')\n"
        "    yield {'x': x, 't': np.array(['a', 'b'], object), 'n': np.arange(3)}\n"
    )
    done, out = job(source, "--data", "load.py", data=data)
    assert done.code == 0, done.err
    assert signature(out) == signature(source)
    assert ops(out).count("QuantizeLinear") == 2


@pytest.mark.parametrize("scheme", ["w8a8", "w8", "w4", "w8a8-dynamic"])
def test_a_quantized_model_is_refused_and_never_quantized_twice(job: Any, run: Run, scheme: str) -> None:
    done, out = job(model(PRODUCTS, **weights()), "--scheme", scheme)
    assert done.code == 0
    before = ops(out)
    again = run("quantize", "q.onnx", "--data", "data.npz", "-o", "r.onnx")
    assert again.code == 3
    assert "the model is quantized already" in again.err
    assert "--requantize" in again.err
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = run("quantize", "q.onnx", "--data", "data.npz", "-o", "r.onnx", "--requantize")
    assert again.code == 0, again.err
    assert ops(onnx.load("r.onnx")) == before, "codes are not quantized again"
