"""The function body: the same numbers as the reference, without the plugin, in every runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import inliner, reference
from outlier_models import Case, open_session, random_case, run
from qpipe.calibrate.errors import UnsupportedError
from qpipe.plugins.outlier_matmul.op import function_proto, pack

OPSETS = (13, 17, 21)
CASES = {
    "plain": ((5, 40), 7, 2, 0.0),
    "rank 3": ((2, 3, 100), 33, 3, 0.0),
    "odd": ((3, 17), 5, 17, 0.0),
    "long": ((4, 1500), 20, 5, 0.0),
}


def case_with_body(name: str, opset: int, *, dtype: type = np.float32, dynamic: bool = False) -> Case:
    shape, outputs, outliers, limit = CASES[name]
    case = random_case(len(name), shape, outputs, outliers, np.dtype(dtype), limit=2.0 if dynamic else limit)
    case.opset = opset
    case.functions = [function_proto(opset=opset, dynamic=dynamic)]
    return case


def check(case: Case, got: np.ndarray, met: int | None = None) -> None:
    exact, bound = case.bounds()
    assert got.shape == exact.shape
    assert got.dtype == case.x.dtype
    assert (np.abs(got.astype(np.float64) - exact) / bound).max() <= 1
    assert met is None or met == case.expected()[1]


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("optimize", [False, True])
def test_onnxruntime_without_the_plugin(name, opset, dynamic, optimize) -> None:
    case = case_with_body(name, opset, dynamic=dynamic)
    onnx.checker.check_model(case.model())
    got, met = run(open_session(case.model(), plugin=False, optimize=optimize), case.x)
    check(case, got, met)


def test_integer_part_does_not_saturate() -> None:
    """Extreme codes: ONNX Runtime's unsigned x signed kernel is wrong here on x86 without VNNI."""
    case = case_with_body("long", 17)
    case.x[:] = np.where(np.random.default_rng(0).random(case.x.shape) < 0.5, -127, 127)
    case.packed.w_q[:, :1500] = np.sign(case.x[0]) * 127
    case.packed.w_q[:, case.packed.outlier_index] = 0
    case.packed.w_scale[:] = 1
    case.packed.w_outlier[:] = 0
    case.bias[:] = 0
    got, _ = run(open_session(case.model(), plugin=False), case.x)
    assert np.abs(got).max() == 1495 * 127 * 127
    np.testing.assert_array_equal(got, case.expected()[0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_codes_are_products_with_the_inverse_of_the_scale(dynamic: bool) -> None:
    """ONNX Runtime's optimizer turns a quotient of 1 and a product into a quotient, which rounds ties another way."""
    case = random_case(0, (2000, 64), 64, 0, np.dtype(np.float32), bias=False, limit=1e6 if dynamic else 0.0)
    amax = np.abs(case.x).max(axis=1, keepdims=True)
    scale = amax / np.float32(127)
    case.x = ((np.rint(case.x / scale) + np.float32(0.5)) * scale).clip(-amax, amax).astype(np.float32)
    case.x[:, :1] = amax
    assert (np.rint(case.x * (np.float32(1) / scale)) != np.rint(case.x / scale)).any(), "the data tells them apart"
    case.packed = pack(np.eye(64, dtype=np.float32), [], np.float32)
    case.functions = [function_proto(opset=17, dynamic=dynamic)]
    check(case, run(open_session(case.model(), plugin=False), case.x)[0])


@pytest.mark.parametrize("opset", [17, 21])
def test_half_precision(opset) -> None:
    case = case_with_body("rank 3", opset, dtype=np.float16)
    check(case, run(open_session(case.model(), plugin=False), case.x)[0])


@pytest.mark.parametrize("outliers", [0, 3])
def test_no_outliers_and_no_bias(outliers) -> None:
    case = random_case(1, (6, 50), 9, outliers, np.dtype(np.float32), bias=False)
    case.functions = [function_proto(opset=17)]
    check(case, run(open_session(case.model(), plugin=False), case.x)[0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_non_finite_rows(dynamic) -> None:
    case = case_with_body("plain", 17, dynamic=dynamic)
    regular = np.setdiff1d(np.arange(40), case.packed.outlier_index)
    case.x[0, regular[0]], case.x[1, regular[1]], case.x[2, case.packed.outlier_index[0]] = np.nan, np.inf, np.inf
    case.x[3] = 0
    got, met = run(open_session(case.model(), plugin=False), case.x)
    expected, count = case.expected()
    assert np.isnan(got[:2]).all()
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    np.testing.assert_array_equal(got[2], expected[2])
    np.testing.assert_array_equal(got[3], case.bias)
    assert met == count


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inlined", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_onnx_reference(name, inlined, dynamic) -> None:
    case = case_with_body(name, 17, dynamic=dynamic)
    model = inliner.inline_local_functions(case.model()) if inlined else case.model()
    check(case, *reference.ReferenceEvaluator(model).run(None, {"x": case.x}))


@pytest.mark.usefixtures("plugin_library")
@pytest.mark.parametrize("name", ["plain", "rank 3", "long"])
def test_the_registered_kernel_wins(name) -> None:
    """Told by the counter: this body does not count, the kernel does."""
    case = case_with_body(name, 17)
    case.limit = 1.0
    got, met = run(open_session(case.model()), case.x)
    check(case, got, met)
    assert met > 0


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_openvino(name, dynamic) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    case = case_with_body(name, 17, dynamic=dynamic)
    model = inliner.inline_local_functions(case.model())
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    results = compiled([case.x])
    check(case, results[0], int(results[1]))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_tract(name, dynamic, tmp_path) -> None:
    tract = pytest.importorskip("tract", reason="tract is not installed")
    case = case_with_body(name, 17, dynamic=dynamic)
    case.counter = False  # tract hands out no int64 that it takes for a dimension
    model = inliner.inline_local_functions(case.model())
    for dim, extent in zip(model.graph.input[0].type.tensor_type.shape.dim, case.x.shape, strict=True):
        dim.dim_value = extent
    onnx.save(model, tmp_path / "model.onnx")
    runnable = tract.onnx().load(str(tmp_path / "model.onnx")).into_model().into_runnable()
    check(case, runnable.run([case.x])[0].to_numpy())


def test_old_opsets_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="newer opset"):
        function_proto(opset=12)
