"""Sessions: exact semantics against as deployed, devices, translated errors, CPU facts."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser
from qpipe.calibrate.errors import EnvironmentError_, ModelError, UnsupportedError, UsageError
from qpipe.pipeline import cpu
from qpipe.pipeline import session as S

RELU = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }'


def _model(text: str) -> onnx.ModelProto:
    return parser.parse_model(text)


def _weight_only() -> tuple[onnx.ModelProto, np.ndarray]:
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (64, 32)).astype(np.int8)
    scale = np.full((2, 32), 0.02, np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wf"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "wf"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 64])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 32])],
        [numpy_helper.from_array(codes, "w"), numpy_helper.from_array(scale, "s")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model, codes.astype(np.float64) * 0.02


@pytest.mark.parametrize("form", ["path", "string", "bytes", "proto"])
def test_every_form_of_model_opens(form: str, tmp_path: Path) -> None:
    model = _model(RELU)
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    given = {"path": path, "string": str(path), "bytes": model.SerializeToString(), "proto": model}[form]
    x = np.array([[-1, 0, 2]], np.float32)
    assert S.make_session(given).run(None, {"x": x})[0].tolist() == [[0, 0, 2]]


def test_exact_keeps_weight_only_products_in_float() -> None:
    model, weight = _weight_only()
    x = np.random.default_rng(1).normal(size=(8, 64)).astype(np.float32)
    expected = x.astype(np.float64) @ weight
    spread = np.abs(expected).max()
    exact = S.make_session(model, exact=True).run(None, {"x": x})[0]
    assert np.abs(exact - expected).max() < 1e-5 * spread
    # Even with the fusion on, accuracy level 1 keeps the activations in float.
    level_1 = S.SessionExtras(config={S.ACCURACY_KEY: S.EXACT_ACCURACY_LEVEL})
    fused = S.make_session(model, extras=level_1).run(None, {"x": x})[0]
    assert np.abs(fused - expected).max() < 1e-5 * spread


def test_deployed_fuses_and_exact_does_not(tmp_path: Path) -> None:
    model, _ = _weight_only()
    ops = {}
    for exact in (True, False):
        written = tmp_path / f"{exact}.onnx"
        S.make_session(model, exact=exact, extras=S.SessionExtras(optimized_model=written))
        ops[exact] = {node.op_type for node in onnx.load(written).graph.node}
    assert ops[True] == {"DequantizeLinear", "MatMul"}
    assert "MatMulNBits" in ops[False]


def test_exact_int8_product_equals_integer_arithmetic() -> None:
    """Full-range uint8 x int8: exact sums, although fused kernels saturate them on CPUs without VNNI."""
    text = """<ir_version: 8, opset_import: ["": 13]> g (float[4, 64] x) => (float[4, 16] y)
        <float s = {0.01}, uint8 z = {0}, float sw = {0.02}, int8 zw = {0}> {
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)
        wf = DequantizeLinear(w, sw, zw)  y = MatMul(d, wf) }"""
    model = _model(text)
    weight = np.full((64, 16), 127, np.int8)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    x = np.full((4, 64), 2.55, np.float32)
    y = S.make_session(model, exact=True).run(None, {"x": x})[0]
    assert np.allclose(y, 64 * 2.55 * 2.54, rtol=1e-6)


def test_facts_say_what_decides_the_numerics() -> None:
    exact, deployed = (S.session_facts(S.make_session(_model(RELU), exact=exact, threads=1)) for exact in (True, False))
    assert exact["graph_optimization"] == "ORT_DISABLE_ALL"
    assert exact["qdq_matmulnbits_accuracy_level"] == 1
    assert deployed["graph_optimization"] == "ORT_ENABLE_ALL"
    assert deployed["qdq_matmulnbits_accuracy_level"] == 4
    assert deployed["threads"] == 1
    assert deployed["providers"] == ["CPUExecutionProvider"]


def test_failing_run_never_moves_to_another_provider(capfd: pytest.CaptureFixture[str]) -> None:
    session = S.make_session(_model(RELU))
    with pytest.raises(S.ort_errors()):
        session.run(None, {"x": np.zeros((1, 7), np.float32)})
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        (
            '<ir_version: 8, opset_import: ["": 17, "cust": 1]> g (float[2] x) => (float[2] y) { y = cust.Odd(x) }',
            EnvironmentError_,
            ("cust::Odd", "--custom-op-library"),
        ),
        (
            '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Odd(x) }',
            ModelError,
            ("operator Odd",),
        ),
        (
            '<ir_version: 10, opset_import: ["": 22]> g (bfloat16[2] x) => (bfloat16[2] y) { y = Relu(x) }',
            UnsupportedError,
            ("no kernel for Relu(14)",),
        ),
        (
            '<ir_version: 99, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Relu(x) }',
            UnsupportedError,
            ("IR version",),
        ),
        (
            '<ir_version: 10, opset_import: ["": 99]> g (float[2] x) => (float[2] y) { y = Relu(x) }',
            UnsupportedError,
            ("opset",),
        ),
        (
            '<ir_version: 8, opset_import: ["": 17]> g (float[2, 3] x, float[4, 5] w) => (float[2, 5] y)'
            " { y = MatMul(x, w) }",
            ModelError,
            ("refuses", "Incompatible dimensions"),
        ),
    ],
)
def test_load_failures_say_what_and_what_to_do(text: str, kind: type, words: tuple[str, ...]) -> None:
    with pytest.raises(kind) as caught:
        S.make_session(_model(text))
    assert type(caught.value) is kind
    assert all(word in str(caught.value) for word in words)
    assert "[ONNXRuntimeError]" not in str(caught.value)


def test_missing_file_broken_bytes_unknown_device(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such model file"):
        S.make_session(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="refuses"):
        S.make_session(b"no model at all")
    with pytest.raises(UsageError, match="tpu"):
        S.make_session(_model(RELU), device="tpu")


def test_cuda_that_is_not_there_is_an_error_and_never_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ort = S.load_onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EnvironmentError_, match="CUDA") as caught:
        S.make_session(_model(RELU), device="cuda")
    assert caught.value.exit_code == 5
    assert "onnxruntime-gpu[cuda,cudnn]" in str(caught.value.do)
    assert S.session_device(S.make_session(_model(RELU), device="auto")) == "cpu"


def test_cuda_that_loads_as_cpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime gives a CPU session and a log line when the CUDA libraries are missing."""
    ort = S.load_onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(S, "session_device", lambda session: "cpu")
    monkeypatch.setattr(S, "_providers", lambda ort, device: ["CPUExecutionProvider"])
    with pytest.raises(EnvironmentError_, match="does not load"):
        S.make_session(_model(RELU), device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not S.cuda_works(), reason="no usable CUDA")
def test_cuda_session_runs_on_cuda() -> None:
    session = S.make_session(_model(RELU), device="cuda")
    assert S.session_device(session) == "cuda"
    assert session.run(None, {"x": np.array([[-1, 0, 2]], np.float32)})[0].tolist() == [[0, 0, 2]]


def test_missing_onnxruntime_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    S.load_onnxruntime.cache_clear()
    with pytest.raises(EnvironmentError_) as caught:
        S.make_session(_model(RELU))
    assert caught.value.exit_code == 5
    assert "pip install 'qpipe[cpu]'" in str(caught.value)
    monkeypatch.undo()
    S.load_onnxruntime.cache_clear()


def test_onnxruntime_without_its_core_is_named_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays behind when one of two overlapping distributions is uninstalled."""
    import types

    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    S.load_onnxruntime.cache_clear()
    with pytest.raises(EnvironmentError_, match="damaged"):
        S.load_onnxruntime()
    monkeypatch.undo()
    S.load_onnxruntime.cache_clear()


def test_library_that_does_not_load_is_named(tmp_path: Path) -> None:
    library = tmp_path / "ops.so"
    library.write_bytes(b"not a library")
    with pytest.raises(EnvironmentError_, match="does not load") as caught:
        S.make_session(_model(RELU), extras=S.SessionExtras(op_libraries=(library,)))
    assert str(library) in str(caught.value)


def test_plugin_that_does_not_load_is_said_and_does_not_stop_other_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = tmp_path / "libqpipe_ops.so"
    library.write_bytes(b"not a library")
    monkeypatch.setenv("QPIPE_PLUGIN", str(library))
    session = S.make_session(_model(RELU))
    assert session.run(None, {"x": np.array([[-1, 0, 2]], np.float32)})[0].tolist() == [[0, 0, 2]]
    assert "without the plugin" in caplog.text
    assert str(library) in S.session_facts(session)["plugin"]


@pytest.mark.parametrize(
    ("text", "vnni", "feature"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", True, "avx512_vnni"),
        ("flags\t\t: fpu avx2 avx_vnni\n", True, "avx_vnni"),
        ("flags\t\t: fpu avx2 amx_int8\n", True, "amx_int8"),
        ("flags\t\t: fpu avx2\n", False, "avx2"),
        ("Features\t: fp asimd asimddp i8mm\n", False, "dotprod"),
        ("model name\t: avx512_vnni lookalike\nflags\t: fpu\n", False, None),
    ],
)
def test_cpu_features_are_read_from_cpuinfo(
    text: str, vnni: bool, feature: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(cpu, "_CPUINFO", path)
    S.cpu_features.cache_clear()
    try:
        assert S.has_vnni() is vnni
        assert feature is None or S.cpu_features()[feature]
        monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
        assert S.int8_saturates() is not vnni
        monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
        assert S.int8_saturates() is False
    finally:
        S.cpu_features.cache_clear()
